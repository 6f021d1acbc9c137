"""What ``generate`` and ``compare`` have in common: prompts, how to answer them, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.formats import PromptFormat
from alignkit.errors import AlignkitError
from alignkit.report.prompts import TURN, as_prompts, gather_prompts
from alignkit.report.sampling import Sampling, complete


@dataclass
class Request:
    """Questions and how to answer them; checked when made, before any model is loaded.

    Args:
        prompts: A prompt, or a list of them.
        prompts_file: More prompts: a .jsonl file of {"prompt": ...} rows, or one a line.
        base: The base model under a checkpoint or adapter, where it has moved since training.
        prompt_format: How a question is put: as the published dialogues (boundary), as the seed
            report's (seed), or by the tokenizer's chat template (chat); as the model was trained.
        raw: Give the prompts to the model as they are, special tokens included.
        stop_at_turn: End an answer where the model starts to write the human's next turn.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the smallest set of tokens that holds this probability.
        repetition_penalty: Above 1 discourages tokens that were there before.
        max_new_tokens: The longest answer.
        seed: Of the draws. Answers do not depend on batch_size, up to rounding: in bfloat16 two
            nearly equal tokens may change places.
        batch_size: Prompts computed side by side.
        dtype: Precision of the model.
        device: Such as cpu or cuda:0; auto takes a GPU where there is one.

    Attributes:
        questions: Every prompt, as given.
        sampling: How the answers are drawn.
        target: The device.

    Raises:
        AlignkitError: Bad prompts or options, or a device that is not there.
    """

    prompts: list[str] | str | None = None
    prompts_file: str | None = None
    base: str | None = None
    prompt_format: PromptFormat = "boundary"
    raw: bool = False
    stop_at_turn: bool = True
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    repetition_penalty: float = Sampling.repetition_penalty
    max_new_tokens: int = Sampling.max_new_tokens
    seed: int = Sampling.seed
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"

    questions: list[str] = field(init=False)
    sampling: Sampling = field(init=False)
    target: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.questions = gather_prompts(self.prompts, self.prompts_file)
        drawn = {f.name: getattr(self, f.name) for f in fields(Sampling) if f.name != "stop"}
        self.sampling = Sampling(**drawn, stop=TURN if self.stop_at_turn else None)
        self.target = resolve_device(self.device)

    def load(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load whatever ``path`` names, in evaluation mode on the device."""
        # Imported late: with the modules comes Lightning, which --help need not wait for.
        from alignkit.modules.checkpoint import load_policy

        model, tokenizer = load_policy(path, base=self.base, dtype=getattr(torch, self.dtype))
        torch.nn.Module.to(model, self.target)  # transformers types its own override away
        return model.train(False), tokenizer

    def answers(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """Answer the questions with a loaded model, one after the other."""
        return ask(
            model,
            tokenizer,
            self.questions,
            self.sampling,
            prompt_format=None if self.raw else self.prompt_format,
            batch_size=self.batch_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """What an answer depends on besides the model and the prompt."""
        drawn = {f.name: getattr(self.sampling, f.name) for f in fields(Sampling)}
        asked = "raw" if self.raw else self.prompt_format
        return {**drawn, "prompt_format": asked, "dtype": self.dtype}


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    sampling: Sampling,
    *,
    prompt_format: PromptFormat | None = "boundary",
    batch_size: int = 8,
) -> Iterator[str]:
    """Answer questions; as `alignkit.report.sampling.complete` otherwise.

    Args:
        model: On the device to compute on.
        tokenizer: The model's.
        questions: What the human says.
        sampling: How to draw.
        prompt_format: See `as_prompts`; ``None`` continues the texts as they are, special tokens
            in them included.
        batch_size: Questions computed side by side.
    """
    texts = list(questions)
    if prompt_format is not None:
        texts = as_prompts(questions, prompt_format, tokenizer)
    specials = prompt_format in (None, "chat")
    return complete(model, tokenizer, texts, sampling, batch_size=batch_size, specials=specials)


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1``, … into a device that is there.

    Raises:
        AlignkitError: There is no such device.
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
    """Text for a terminal: no markup, and none of the control codes a model may have learned."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def as_json(value: object) -> str:
    """JSON for people: indented, in their own script."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
