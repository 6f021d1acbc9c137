"""Collect the prompts and options that ``generate`` and ``compare`` share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.encode.tokens import TextEncoder
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import load_policy, policy_format
from alignkit.models.text_format import TextFormat, TextKind
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.asking import DEFAULT_FORMAT, choose_format, warn_of_length
from alignkit.tools.generate.fitting import rendered_before
from alignkit.tools.generate.prompts import TURN, Question, as_prompts, files_asked, gather_prompts
from alignkit.tools.generate.sampling import Sampling, complete
from alignkit.utils.atomic import refuse_overwriting

log = logging.getLogger(__name__)


@dataclass
class Request:
    """Hold questions and the options for answering them, checked before a model is loaded.

    Example:
        >>> request = Request(prompts="How do I boil an egg?", temperature=0, device="cpu")
        >>> request.questions, request.target
        (['How do I boil an egg?'], device(type='cpu'))

    Args:
        prompts: A prompt, or a list of them.
        prompts_file: More prompts: a .jsonl file of {"prompt": ...} rows, a .json array of them or
            of texts, or a .txt file with one a line; .gz and .zst as well.
        data: A data set whose prompts are answered, each once: those of its test split if it has
            one; DATA#SPLIT takes another, and DATA#test[:100] a part of one.
        base: The base model of a checkpoint or adapter, if it has moved since training.
        prompt_format: How a question is formatted: as HH-RLHF's dialogues (boundary), as dialogues
            of stripped texts (stripped), by the tokenizer's chat template (chat), as it is (text),
            or as it is with special tokens read as such (raw). By default as the model was
            trained; for a model that does not say, chat where its tokenizer has a chat template,
            and boundary elsewhere.
        system: A system message before each question; by default the one that all of the model's
            training examples had, if they did; an empty text for none.
        raw: Short for prompt_format raw.
        stop_at_turn: End an answer where the model starts to write the human's next turn, in the
            formats that write turns as plain text.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the smallest set of tokens that holds this probability.
        repetition_penalty: Above 1 discourages tokens that occurred before.
        max_new_tokens: The largest number of tokens of an answer.
        generation: Further options of transformers' ``GenerationConfig`` by name, such as top_k or
            num_beams; what has no meaning here is refused.
        seed: Seed of the draws. Answers do not depend on batch_size, up to rounding: in bfloat16
            two nearly equal tokens may change places.
        batch_size: Prompts computed side by side.
        dtype: Precision of the model.
        device: Such as cpu or cuda:0; auto takes a GPU if there is one.

    Attributes:
        questions: Every prompt, as given.
        sampling: How the answers are drawn.
        target: The device.

    Raises:
        AlignkitError: Bad prompts or options, or a device that does not exist.
    """

    prompts: list[str] | str | None = None
    prompts_file: str | None = None
    data: str | None = None
    base: str | None = None
    prompt_format: TextKind | None = None
    system: str | None = None
    raw: bool = False
    stop_at_turn: bool = True
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    repetition_penalty: float = Sampling.repetition_penalty
    max_new_tokens: int = Sampling.max_new_tokens
    generation: dict[str, Any] = field(default_factory=dict)
    seed: int = Sampling.seed
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"

    questions: list[Question] = field(init=False)
    sampling: Sampling = field(init=False)
    target: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if self.raw and self.prompt_format not in (None, "raw"):
            raise AlignkitError(f"raw: contradicts prompt_format={self.prompt_format}; pass one")
        self.questions = gather_prompts(self.prompts, self.prompts_file, self.data)
        drawn = {f.name: getattr(self, f.name) for f in fields(Sampling) if f.name != "stop"}
        self.sampling = Sampling(**drawn)
        self.target = resolve_device(self.device)

    def refuse_overwriting(self, outputs: Mapping[str, Path | None]) -> None:
        """Refuse to write a file that prompts are read from; see `refuse_overwriting`."""
        refuse_overwriting(outputs, files_asked(self.prompts_file, self.data))

    def load(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model and tokenizer that ``path`` names, in eval mode on the device.

        Raises:
            AlignkitError: There is no model, or it is damaged.
        """
        model, tokenizer = load_policy(path, base=self.base, dtype=getattr(torch, self.dtype))
        torch.nn.Module.to(model, self.target)  # transformers' override is untyped
        return model.train(False), tokenizer

    def format_for(self, path: str, tokenizer: PreTrainedTokenizerBase) -> TextFormat:
        """Return the text format to ask a model with: the user's, or that of its training."""
        return choose_format(
            policy_format(path),
            tokenizer,
            name=path,
            prompt_format="raw" if self.raw else self.prompt_format,
            system=self.system,
        )

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: TextFormat,
        name: str = "model",
        told: Callable[[str], None] | None = None,
        heard: Callable[[Answer], None] | None = None,
    ) -> Iterator[str]:
        """Yield a loaded model's answers to the questions, in order.

        Args:
            model: The model, on the device to compute on.
            tokenizer: Its tokenizer.
            asked: The text format of the questions.
            name: The model's name in the log.
            told: Gets each piece of an answer as it is drawn.
            heard: Gets each answer with its tokens.
        """
        return answer_questions(
            model,
            tokenizer,
            self.questions,
            self.sampling_for(asked),
            asked,
            name=name,
            batch_size=self.batch_size,
            told=told,
            heard=heard,
        )

    def sampling_for(self, asked: TextFormat) -> Sampling:
        """Return how answers are drawn in a text format."""
        stops = self.stop_at_turn and asked.prompt_format in ("boundary", "stripped", "raw")
        return replace(self.sampling, stop=TURN if stops else None)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that an answer depends on, beside model, text format and prompt."""
        drawn = {f.name: getattr(self.sampling, f.name) for f in fields(Sampling)}
        drawn["stop"] = TURN if self.stop_at_turn else None
        return {**drawn, "dtype": self.dtype}


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    sampling: Sampling,
    asked: TextFormat = DEFAULT_FORMAT,
    *,
    name: str = "model",
    batch_size: int = 8,
    told: Callable[[str], None] | None = None,
    heard: Callable[[Answer], None] | None = None,
    draws: int = 1,
    done: int = 0,
) -> Iterator[str]:
    """Yield a model's answers to questions; see `alignkit.tools.generate.sampling.complete`.

    Args:
        model: The model, on the device to compute on.
        tokenizer: The model's tokenizer.
        questions: What the human says.
        sampling: How to draw answers.
        asked: The text format of the questions; see `choose_format`.
        name: The model's name in the log.
        batch_size: Questions computed side by side.
        told: Gets each piece of an answer as it is drawn.
        heard: Gets each answer with its tokens.
        draws: As in `complete`, as for ``done``.
        done: Questions that are left out.

    Raises:
        AlignkitError: A question cannot be formatted, is empty or is too long for the model.
    """
    kind = asked.prompt_format
    for number, sign in rendered_before(questions, asked, tokenizer):
        log.warning(
            "prompt %d: %s, and is put as prompt_format=%s once more; pass --raw if it was "
            "rendered already", number, sign, kind,
        )  # fmt: skip
    texts = as_prompts(
        questions, kind, tokenizer, chat_template=asked.chat_template, system=asked.system
    )
    lengths = [len(ids) for ids in TextEncoder(tokenizer).prompts(texts, kind)]
    warn_of_length(lengths, asked, name)
    return complete(
        model,
        tokenizer,
        texts,
        sampling,
        batch_size=batch_size,
        kind=kind,
        ends=asked.ends,
        told=told,
        heard=heard,
        draws=draws,
        done=done,
    )


def describe_format(asked: TextFormat) -> dict[str, str | None]:
    """Return the prompt format and system message of a question, for a file of answers."""
    return {"prompt_format": asked.prompt_format, "system": asked.system}


def resolve_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda``, ``cuda:1``, … names.

    Raises:
        AlignkitError: There is no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # torch without CUDA raises an AssertionError, other backends a NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AlignkitError(
            f"device '{device}': not available on this machine; pass cpu or auto"
        ) from error
    return found


def printable(text: str) -> Text:
    """Return text for a terminal, without markup and with control codes replaced."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def as_json(value: object) -> str:
    """Return a value as indented JSON, with letters of any script unescaped."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
