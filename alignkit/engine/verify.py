"""Check that scores equal the model's own, and remember up to which length that was checked.

A check scores a few short examples, and one that is longer than every length at which the model may
begin to compute differently (`alignkit.engine.lengths`). It finds a window that packed rows ignore,
and a token that depends on another sequence of its row. Some lengths take too long to check when a
model is made. They are checked when a sequence first reaches them, on the device that trains. A
batch that packed rows would score wrongly is scored one sequence a forward, once the same check has
passed for that.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from alignkit.batch import Example, PackedBatch
from alignkit.engine.compare import Score, comparison_examples, find_fault, reason_of
from alignkit.engine.interface import use_own_attention
from alignkit.engine.lengths import longest_position, named_lengths
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)

Packing: TypeAlias = Literal["auto", "require"]

TESTED_FAMILIES = ("gpt2", "gpt_neox", "llama")
"""Families that our own tests check; they need no check before their first score."""
CHECK_BUDGET = 2e11
"""Parameters x tokens that a check may cost when a model is made, which is seconds on a CPU."""
SHORTEST_PACKED = 8
"""Tokens up to which packed rows must be right, at least, for any to be packed."""

# Attributes of a model, which hold its `VerifiedLengths` and its `Packing`.
_VERIFIED = "_alignkit_verified_lengths"
_PACKING = "_alignkit_packing"


@dataclass(frozen=True)
class Scorers:
    """Hold the two functions that score a batch, each of which returns log-probs alone.

    Example:
        >>> scorers = Scorers(packed=lambda model, batch: 0.0, alone=lambda model, batch: 1.0)
        >>> scorers.alone(None, None)
        1.0

    Attributes:
        packed: Scores all sequences in one row.
        alone: Scores one sequence a forward.
    """

    packed: Score
    alone: Score


@dataclass(frozen=True)
class VerifiedLengths:
    """Hold up to which length of its longest sequence a batch is known to be scored rightly.

    Example:
        >>> verified = VerifiedLengths(packed=4096, alone=math.inf, fault="scores are off")
        >>> 5000 <= verified.packed, 5000 <= verified.alone
        (False, True)

    Attributes:
        packed: The length for a packed row.
        alone: The length for one sequence a forward; 0 where that was not checked.
        fault: What is wrong with rows longer than ``packed``; empty where none was found.
    """

    packed: float
    alone: float = 0.0
    fault: str = ""


def verify_scores(model: PreTrainedModel, scorers: Scorers, length: int = 0) -> VerifiedLengths:
    """Compare scores with the model's own, and record on the model up to which length they agree.

    Args:
        model: On any device, in any mode. Neither changes.
        scorers: The two ways to score it.
        length: Of the longest sequence that is to be scored; 0 for as long as is cheap.

    Returns:
        The record.

    Raises:
        AlignkitError: Neither way is right, or packed rows are required and wrong.
    """
    before: VerifiedLengths | None = getattr(model, _VERIFIED, None)
    lengths = named_lengths(model)
    if not length:
        affordable = CHECK_BUDGET / max(sum(p.numel() for p in model.parameters()), 1)
        length = next((n + 1 for n in reversed(lengths) if n < affordable), 0)
    limit = longest_position(model)
    length = length if limit is None else min(length, limit)
    examples = comparison_examples(model, length, limit)
    longest = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    holds = next((n for n in lengths if n >= longest), math.inf)
    fault = before.fault if before is not None else ""
    fault = fault or _check_examples(model, scorers.packed, examples) or ""
    if not fault:
        verified = VerifiedLengths(packed=holds)
    else:
        if getattr(model, _PACKING, "auto") == "require":
            raise _packing_error(model, fault, length, before)
        packed = (
            before.packed if before else _longest_packed(model, scorers.packed, lengths, length)
        )
        while True:
            if not packed:
                use_own_attention(model)
            unfit = _check_examples(model, scorers.alone, examples, looks_ahead=True)
            if not unfit or not packed:
                break
            # Some layers know their own attention by its name alone: take no packed rows at all.
            packed = 0.0
        if unfit:
            raise _scoring_error(model, f"in packed rows {fault}; one sequence a forward {unfit}")
        verified = VerifiedLengths(packed, holds, fault)
        if before is None or not before.fault:
            _log_unpacked(model, verified)
    setattr(model, _VERIFIED, verified)
    return verified


def fits_a_row(model: PreTrainedModel, scorers: Scorers, batch: PackedBatch) -> bool:
    """Tell whether to score a batch as one packed row, and check its length where it is new.

    Returns:
        ``False`` for a batch that is to be scored one sequence a forward.

    Raises:
        AlignkitError: As `verify_scores` does.
    """
    verified: VerifiedLengths | None = getattr(model, _VERIFIED, None)
    if verified is None:
        if model.config.model_type in TESTED_FAMILIES:
            lengths = named_lengths(model)
            verified = VerifiedLengths(packed=lengths[0] if lengths else math.inf)
            setattr(model, _VERIFIED, verified)
        else:
            verified = verify_scores(model, scorers)
    if batch.longest <= verified.packed:
        return True
    if batch.longest > verified.alone:
        log.info("attention: probing sequences of %d tokens", batch.longest)
        verified = verify_scores(model, scorers, batch.longest)
    return batch.longest <= verified.packed


def needs_no_probe(model: PreTrainedModel, longest: int) -> bool:
    """Tell whether a batch whose longest sequence has this length is known to fit a packed row."""
    verified: VerifiedLengths | None = getattr(model, _VERIFIED, None)
    return verified is not None and longest <= verified.packed


def assume_packed(model: PreTrainedModel) -> None:
    """Record that packed rows are right, unchecked, for a model whose tensors have no content."""
    setattr(model, _VERIFIED, VerifiedLengths(packed=math.inf))


def is_never_packed(model: PreTrainedModel) -> bool:
    """Tell whether a model is known to be scored one sequence a forward, whatever the length."""
    verified: VerifiedLengths | None = getattr(model, _VERIFIED, None)
    return verified is not None and bool(verified.fault) and not verified.packed


def set_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Set whether a model may be scored one sequence a forward, and forget what was checked."""
    setattr(model, _PACKING, packing)
    if hasattr(model, _VERIFIED):
        delattr(model, _VERIFIED)


def _check_examples(
    model: PreTrainedModel, score: Score, examples: list[Example], looks_ahead: bool = False
) -> str | None:
    try:
        return find_fault(model, score, examples, looks_ahead)
    except (AlignkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers' models raise many kinds of errors
        reason = f"its own forward fails on tokens alone ({reason_of(error)})"
        raise _scoring_error(model, reason) from error


def _longest_packed(
    model: PreTrainedModel, score: Score, lengths: Sequence[int], wrong: int
) -> float:
    """Return the largest length below a wrong one where packed rows are right; 0 for none."""
    candidates = [length for length in lengths if SHORTEST_PACKED <= length < wrong]

    def is_wrong(length: int) -> bool:
        return _check_examples(model, score, comparison_examples(model, length, length)) is not None

    count = bisect_left(candidates, True, key=is_wrong)
    return candidates[count - 1] if count else 0.0


def _log_unpacked(model: PreTrainedModel, verified: VerifiedLengths) -> None:
    beyond = f", from sequences of more than {verified.packed} tokens on" if verified.packed else ""
    log.warning(
        "model: %s is scored one sequence a forward%s, which takes longer: in packed rows %s",
        type(model).__name__, beyond, verified.fault,
    )  # fmt: skip


def _packing_error(
    model: PreTrainedModel, fault: str, length: int, before: VerifiedLengths | None
) -> AlignkitError:
    if before is not None and before.packed:
        return AlignkitError(
            f"data: a sequence of {length} tokens is longer than the {before.packed} up to which "
            f"packed rows are right for this model; lower data.max_length to {before.packed}, or "
            f"set model.packing to auto ({fault})"
        )
    return AlignkitError(
        f"model.packing=require: {type(model).__name__} cannot be scored in packed rows: {fault}; "
        "set it to auto to score one sequence a forward, or use another model"
    )


def _scoring_error(model: PreTrainedModel, reason: str) -> AlignkitError:
    return AlignkitError(
        f"model: {type(model).__name__} cannot be scored: {reason}; use another model (gpt2, "
        "gpt_neox and llama are tested)"
    )
