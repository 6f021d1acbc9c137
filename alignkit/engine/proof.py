"""Packed scores are trusted where they were seen to equal the model's own, and nowhere else.

A probe is a few short examples and one longer than every length at which the model may begin to
compute something else (`alignkit.engine.lengths`), so that a window that is dropped and a
neighbour that matters both show. Lengths too long for the moment a model is made wait until a
sequence reaches them: it is probed then, on the device that trains.

Shape letters: N scored tokens, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.engine.batch import Example, PackedBatch, collate
from alignkit.engine.fp32 import in_fp32
from alignkit.engine.interface import backbone, use_packed_attention
from alignkit.engine.lengths import longest_position, named_lengths, text_config
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)

Score = Callable[[PreTrainedModel, PackedBatch], Tensor]

TESTED = ("gpt2", "gpt_neox", "llama")
"""Families whose scores our own tests prove: these are not probed before their first score."""
WORK = 2e11
"""Parameters x tokens that a probe may cost when a model is made: seconds on a CPU."""
ENDS = 64
"""Tokens of a long sequence that are compared: its last ones."""
LOUD = 10.0
"""Spread of the probe's logits in nats, so that a soft-cap shows before training makes them so."""
TOLERANCE = 1e-4
"""Largest difference in fp32, as a part of the spread of the logits."""

_PROVED = "_alignkit_proved"


def prove(model: PreTrainedModel, score: Score, reach: int = 0) -> None:
    """Compare packed scores of a probe with the model's own, and note up to where they hold.

    In fp32 they must agree to rounding, in half precision they must be as near to fp32 as the
    model's own are.

    Args:
        model: On any device, in any mode; both stay as they are.
        score: Packed log-probs of a batch, [N].
        reach: Length of the longest sequence that is to be scored; 0 for as long as is cheap.

    Raises:
        AlignkitError: They differ, or the model's forward fails on a packed row.
    """
    lengths = named_lengths(model)
    if not reach:
        affordable = WORK / max(sum(p.numel() for p in model.parameters()), 1)
        reach = next((n + 1 for n in reversed(lengths) if n < affordable), 0)
    limit = longest_position(model)
    try:
        examples = _probe(model, reach if limit is None else min(reach, limit), limit)
        _compare(model, score, examples)
    except (AlignkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers' many models raise over a packed row
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refusal(
            model, f"its forward fails on them ({type(error).__name__}: {reason})"
        ) from error
    longest = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    beyond = lengths[bisect_left(lengths, longest) :]
    setattr(model, _PROVED, beyond[0] if beyond else math.inf)


def require_proof(model: PreTrainedModel, score: Score, batch: PackedBatch) -> None:
    """Prove a model before the first score that goes beyond what is proved.

    Raises:
        AlignkitError: As `prove` does.
    """
    proved = getattr(model, _PROVED, None)
    if proved is None:
        if model.config.model_type in TESTED:
            lengths = named_lengths(model)
            proved = lengths[0] if lengths else math.inf
            setattr(model, _PROVED, proved)
        else:
            prove(model, score)
            proved = getattr(model, _PROVED)
    if batch.longest <= proved:
        return
    log.info("attention: probing sequences of %d tokens, beyond %d", batch.longest, proved)
    try:
        prove(model, score, batch.longest)
    except AlignkitError as error:
        raise AlignkitError(
            f"data: a sequence of {batch.longest} tokens is longer than the {proved} up to which "
            f"packed rows are right for this model; lower data.max_length to {proved} ({error})"
        ) from error


def _refusal(model: PreTrainedModel, reason: str) -> AlignkitError:
    return AlignkitError(
        f"model: packed rows are not supported for {type(model).__name__}: {reason}; "
        "use another model (gpt2, gpt_neox and llama are tested)"
    )


def _probe(model: PreTrainedModel, longest: int, limit: int | None) -> list[Example]:
    """Short examples, and one of ``longest`` tokens if that is longer; all within ``limit``."""
    vocabulary = text_config(model).vocab_size
    count = max(longest, 24)
    ids = [(37 * i + 11) % vocabulary for i in range(count)]
    half = 9 if limit is None else max(1, min(9, limit // 2))
    examples = [
        Example(ids[:half], [ids[half : half + 6][:half], ids[half + 6 : half + 15][:half]]),
        Example(ids[20:21], [ids[1:3]]),
        Example([], [ids[3 : 3 + half]]),
    ]
    if longest > 2 * half:
        middle = longest // 2
        last = [False] * (longest - middle)
        last[-ENDS:] = [True] * len(last[-ENDS:])
        near = ids[5:9]
        examples.append(
            Example(ids[:middle], [ids[middle:longest], near], [last, [True] * len(near)])
        )
    return examples


def _compare(model: PreTrainedModel, score: Score, examples: list[Example]) -> None:
    device = model.device
    batch = collate(examples).to(device)
    half_precision = model.dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad(), _in_eval_mode(model), _loud(model, examples[1]):
        use_packed_attention(model)
        with in_fp32(model, device):
            packed = score(model, batch)
            truth, spread = _plain_scores(model, examples, device)
        if not truth.isfinite().all():
            raise AlignkitError(
                f"model: {type(model).__name__} itself scores NaN or infinity, although its "
                "weights are numbers: they are damaged or too large; use another base or start"
            )
        difference = (packed - truth).abs().max().item()
        if not difference <= TOLERANCE * spread:
            raise _refusal(
                model,
                f"their scores are off by {difference:.2g} nats (logits spread {spread:.2g}) from "
                f"its own, one sequence at a time",
            )
        if half_precision:
            rounded = score(model, batch) - truth
            plain, _ = _plain_scores(model, examples, device)
            fault = _rounds_worse(rounded, plain - truth, batch.response_index)
            if fault:
                dtype = str(model.dtype).removeprefix("torch.")
                raise _refusal(model, f"in {dtype} {fault} of the model's own scores")


def _rounds_worse(packed_N: Tensor, plain_N: Tensor, response_N: Tensor) -> str | None:
    """Does rounding harm packed scores more than the model's own: a token, a sum, or on average?

    A router that sends a token to another expert for its last bit makes errors of any size in a
    few tokens of either: errors count up to five times the usual one.

    Args:
        packed_N, plain_N: Errors of both against fp32.
        response_N: Which response each token belongs to.

    Returns:
        What is worse, or ``None``. Margins are such that chance does not reach them.
    """
    noise = 1.5 * plain_N.abs().median().item() + 1e-6
    errors = [
        errors_N.nan_to_num(math.inf).clamp(-5 * noise, 5 * noise)
        for errors_N in (packed_N, plain_N)
    ]
    rms, own_rms = (errors_N.square().mean().sqrt().item() for errors_N in errors)
    if rms > 3 * own_rms + 1e-6:
        return (
            f"rounding errors of {rms:.2g} nats a token are more than three times the {own_rms:.2g}"
        )
    mean, own_mean = (errors_N.mean().item() for errors_N in errors)
    if abs(mean) > abs(own_mean) + 5 * noise / math.sqrt(len(plain_N)):
        return f"mean errors of {mean:+.2g} nats are far beyond the {own_mean:+.2g}"
    counts_R = torch.bincount(response_N)
    sums_R, own_R = (
        errors_N.new_zeros(len(counts_R)).index_add(0, response_N, errors_N) for errors_N in errors
    )
    if (sums_R.abs() > own_R.abs().max() + 5 * noise * counts_R.sqrt()).any():
        return f"sums are off by {sums_R.abs().max().item():.2g} nats, far beyond the rounding"
    return None


def _plain_scores(
    model: PreTrainedModel, examples: list[Example], device: torch.device
) -> tuple[Tensor, float]:
    """Score each response in a forward of its own, as transformers computes it.

    Returns:
        [N] fp32 log-probs in a batch's order, and the mean spread of the logits over V.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    scores, spreads = [], []
    with _own_attention(model):
        for example in examples:
            for k, response in enumerate(example.responses):
                scored = example.scored[k] if example.scored else [True] * len(response)
                wanted = [
                    len(example.prompt) + j
                    for j, taken in enumerate(scored)
                    if taken and len(example.prompt) + j
                ]
                row = torch.tensor([[*example.prompt, *response]], device=device)
                # The last logits alone, from that which predicts the first token wanted.
                kept = row.shape[1] - wanted[0] + 1
                more = {"logits_to_keep": kept} if keeps else {}
                logits_LV = model(row, use_cache=False, **more).logits[0, -kept:].float()
                predictors = torch.tensor(wanted, device=device) - (row.shape[1] - kept) - 1
                logits_NV = logits_LV[predictors]
                targets_N1 = row[0, wanted][:, None]
                scores.append(logits_NV.log_softmax(-1).gather(1, targets_N1)[:, 0])
                spreads.append(logits_NV.std(-1).mean())
    return torch.cat(scores), torch.stack(spreads).mean().item()


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attend as transformers does, without our function in between."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        use_packed_attention(model)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _loud(model: PreTrainedModel, example: Example) -> Iterator[None]:
    """Scale the last hidden states so that logits spread by `LOUD`, if they spread by less.

    Both ways of scoring go through the same decoder, so that they stay comparable.
    """
    with in_fp32(model, model.device):
        _, spread = _plain_scores(model, [example], model.device)
    factor = max(1.0, LOUD / spread) if spread > 0 else 1.0

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    # The innermost model that makes hidden states: some heads pass over what wraps it.
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        decoder = backbone(model)
    handle = decoder.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
