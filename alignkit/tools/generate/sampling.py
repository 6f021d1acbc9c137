"""Generate text from a causal language model, independently of what else is in the batch.

Each prompt draws its noise from a generator of its own, and padding affects nothing. An answer
depends on the seed, the prompt and its place in the list, and not on ``batch_size``.

Shape letters: B prompts of one batch, L padded tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from alignkit.data.encode.tokens import TextEncoder
from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size
from alignkit.models.text_format import TextKind
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.fitting import check_ids, check_lengths
from alignkit.tools.generate.options import (
    check_options,
    passed,
    readable,
    refuse_unknown_tokens,
    warpers,
)
from alignkit.tools.generate.pieces import Pieces
from alignkit.tools.generate.stopping import drawn_tokens, stopping_at

_GenerationConfig: Any = GenerationConfig  # upstream's signature is untyped


@dataclass(frozen=True)
class Sampling:
    """Hold the options for drawing text.

    Example:
        >>> Sampling(temperature=0).max_new_tokens  # greedy
        128

    Attributes:
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the smallest set of tokens that holds this probability, in (0, 1].
        repetition_penalty: Divides the positive (multiplies the negative) logits of every token
            of the prompt and the answer so far; 1 changes nothing (Keskar et al. 2019, CTRL,
            arXiv:1909.05858, section 4.1).
        max_new_tokens: The largest number of tokens of an answer.
        seed: Seed of the noise; with temperature 0 it changes nothing.
        stop: A text that ends an answer and is removed with all that follows; ``None`` for EOS
            alone.
        generation: Further options of transformers' ``GenerationConfig``, by name.

    Raises:
        AlignkitError: A value out of its range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 128
    seed: int = 0
    stop: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not valid:
                raise AlignkitError(f"{name}: must be {rule}, got {getattr(self, name)}")
        check_options(self.generation, self.temperature, self.max_new_tokens)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    kind: TextKind = "boundary",
    ends: Sequence[int] = (),
    told: Callable[[str], None] | None = None,
    heard: Callable[[Answer], None] | None = None,
    draws: int = 1,
    done: int = 0,
) -> Iterator[str]:
    """Yield the continuations of each prompt, in order and batch by batch.

    Args:
        model: The model, on the device to compute on. Its mode and generation config are restored.
        tokenizer: The model's tokenizer, with a padding token; EOS ends an answer.
        prompts: The texts exactly as the model reads them; they are encoded as in training.
        sampling: How to draw.
        batch_size: Prompts computed side by side.
        kind: The format of the prompts, which decides about BOS and special tokens in them.
        ends: Token ids that ended answers in training, beside EOS.
        told: Gets each piece of an answer as it is drawn; one prompt at a time then.
        heard: Gets each answer with its tokens.
        draws: How many answers to give to each prompt, each with noise of its own.
        done: Leave out so many prompts, which have their answers; the others' are the same.

    Yields:
        Each answer, without EOS, ``sampling.stop`` and surrounding white space.

    Raises:
        AlignkitError: A prompt is empty, or is too long for the model's context together with its
            answer; raised before anything is computed.
    """
    if batch_size < 1:
        raise AlignkitError(f"batch_size: must be 1 or more, got {batch_size}")
    encoder = TextEncoder(tokenizer)
    rows = encoder.prompts(prompts, kind)
    check_ids(model, rows)
    refuse_unknown_tokens(sampling.generation, embedding_size(model))
    check_lengths(model, [len(row) for row in rows], sampling.max_new_tokens)
    if told is not None:
        batch_size = 1
    drawn = [row for row in rows for _ in range(draws)]
    for start in range(done * draws, len(drawn), batch_size):
        batch = drawn[start : start + batch_size]
        for answer in _complete_batch(model, tokenizer, batch, sampling, start, ends, told):
            if heard is not None:
                heard(answer)
            yield answer.text


@torch.no_grad()
def _complete_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    first: int,
    ends: Sequence[int],
    told: Callable[[str], None] | None,
) -> list[Answer]:
    width = max(len(row) for row in rows)
    pad: int = tokenizer.pad_token_id
    ids_BL = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids_BL, mask_BL = ids_BL.to(model.device), mask_BL.to(model.device)
    eos = _eos_ids(model, tokenizer) | set(ends)
    options = passed(sampling.generation)
    strings = options.pop("stop_strings", None)
    config = _GenerationConfig(
        do_sample=False,  # the last processor adds the noise that makes the argmax a draw
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(eos),
        **options,
    )

    def text(ids: list[int]) -> str:
        return _text(tokenizer, ids, eos, sampling.stop)

    generator: Any = model  # `generate` is mixed in where type checkers cannot see it
    given = dict(sampling.generation)
    if given.get("token_healing") and tokenizer.bos_token_id is None:
        raise AlignkitError("token_healing: needs a tokenizer with a BOS token; leave it out")
    refused = readable("generation", given) if given else nullcontext()
    with _as_generator(model), refused:
        stops = stopping_at(tokenizer, sampling.stop, strings, width)
        output_BL = generator.generate(
            ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=_processors(sampling, mask_BL, first),
            stopping_criteria=stops,
            streamer=None if told is None else Pieces(text, told, sampling.stop),
            tokenizer=tokenizer,  # which heals tokens
        )
    drawn = [drawn_tokens(row, width, pad, eos, stops) for row in output_BL.tolist()]
    return [_answer(tokenizer, row, eos, sampling.stop, text(row)) for row in drawn]


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokenizer's EOS and of the end tokens in the generation config."""
    theirs = model.generation_config.eos_token_id if model.generation_config else None
    ids = theirs if isinstance(theirs, list) else [theirs]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: set[int], stop: str | None, text: str
) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    ended = end < len(ids) or (stop is not None and stop in tokenizer.decode(ids))
    return Answer(text, tuple(ids[:end]), ended, tuple(ids[end : end + 1]))


def _text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: set[int], stop: str | None
) -> str:
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return (text.split(stop)[0] if stop else text).strip()


@contextmanager
def _as_generator(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode without its own sampling defaults, within the block.

    transformers fills options that a generation config leaves open (minimal lengths, forbidden
    n-grams) from the model's own, which would change the result and appear nowhere in the command.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = model.generation_config
    model.train(False)
    model.generation_config = _GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
        for module, training in modes:
            module.training = training


def _processors(sampling: Sampling, mask_BL: Tensor, first: int) -> LogitsProcessorList:
    processors: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        processors.append(_RepetitionPenalty(sampling.repetition_penalty, mask_BL))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors += warpers(sampling.generation)
        processors.append(_GumbelNoise(sampling.seed, range(first, first + len(mask_BL))))
    return LogitsProcessorList(processors)


class _RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """Apply transformers' repetition penalty without counting padding.

    With EOS as padding, transformers' own would lower the probability of EOS for shorter prompts.
    """

    def __init__(self, penalty: float, mask_BL: Tensor) -> None:
        super().__init__(penalty)
        self.mask_BL = mask_BL.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = self.mask_BL.shape[1]
        prompt_BL = input_ids[:, :width]
        beams = len(input_ids) // len(self.mask_BL)
        # The last column holds a real token of every left-padded row. Put in the place of padding
        # it occurs several times, and is still penalised once.
        prompt_BL = torch.where(
            self.mask_BL.repeat_interleave(beams, 0), prompt_BL, prompt_BL[:, -1:]
        )
        seen = torch.cat([prompt_BL, input_ids[:, width:]], dim=1)
        return super().__call__(seen, scores)  # type: ignore[no-any-return]


class _GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to scores, so that their argmax is a draw from softmax(scores).

    Each prompt has a generator of its own, on the CPU, so that neither the batch nor the device
    changes a draw (Gumbel-max trick; Maddison et al. 2014, arXiv:1411.0030).
    """

    def __init__(self, seed: int, prompts: Sequence[int]) -> None:
        # Seeding with a string mixes both numbers; torch's CPU generator keeps 32 bits.
        seeds = [Random(f"{seed} {prompt}").getrandbits(32) for prompt in prompts]
        self.generators = [torch.Generator().manual_seed(value) for value in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exponential_BV = torch.empty(scores.shape)
        for row, generator in zip(exponential_BV, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential_BV.log().to(scores.device)
