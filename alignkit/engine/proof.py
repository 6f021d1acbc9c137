"""Scores are trusted where they were seen to equal the model's own, and nowhere else.

A probe is a few short examples and one longer than every length at which the model may begin to
compute something else (`alignkit.engine.lengths`), so that a window that is dropped and a
neighbour that matters both show. Lengths too long for the moment a model is made wait until a
sequence reaches them: it is probed then, on the device that trains. What packed rows do not score
rightly is scored one sequence a forward, once that is proved in the same way.
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
from alignkit.engine.interface import use_own_attention
from alignkit.engine.lengths import longest_position, named_lengths
from alignkit.engine.probe import Score, find_fault, probe_examples, reason_of
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)

Packing: TypeAlias = Literal["auto", "require"]

TESTED = ("gpt2", "gpt_neox", "llama")
"""Families whose scores our own tests show right: these are not probed before their first score."""
WORK = 2e11
"""Parameters x tokens that a probe may cost when a model is made: seconds on a CPU."""
SHORTEST = 8
"""Tokens of the shortest sequences whose rows are worth packing on their own."""

_STANDING = "_alignkit_standing"
_PACKING = "_alignkit_packing"


@dataclass(frozen=True)
class Ways:
    """The two ways to score a batch, each as its log-probs alone.

    Attributes:
        packed: All sequences in one row.
        alone: One sequence a forward.
    """

    packed: Score
    alone: Score


@dataclass(frozen=True)
class Standing:
    """Up to which length of its longest sequence a batch was seen to be scored rightly.

    Attributes:
        packed: As a packed row.
        alone: One sequence a forward; 0 while nobody has looked.
        fault: What is wrong with rows that reach beyond ``packed``; empty while nobody has looked.
    """

    packed: float
    alone: float = 0.0
    fault: str = ""


def verify_scores(model: PreTrainedModel, ways: Ways, reach: int = 0) -> Standing:
    """Compare scores of a probe with the model's own, and note on the model how far they hold.

    Args:
        model: On any device, in any mode; both stay as they are.
        ways: To score it.
        reach: Length of the longest sequence that is to be scored; 0 for as long as is cheap.

    Returns:
        What was noted.

    Raises:
        AlignkitError: Neither way is right, or packed rows are not and are required.
    """
    before: Standing | None = getattr(model, _STANDING, None)
    lengths = named_lengths(model)
    if not reach:
        affordable = WORK / max(sum(p.numel() for p in model.parameters()), 1)
        reach = next((n + 1 for n in reversed(lengths) if n < affordable), 0)
    limit = longest_position(model)
    reach = reach if limit is None else min(reach, limit)
    examples = probe_examples(model, reach, limit)
    longest = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    holds = next((length for length in lengths if length >= longest), math.inf)
    fault = before.fault if before is not None else ""
    fault = fault or _fault(model, ways.packed, examples) or ""
    if not fault:
        standing = Standing(packed=holds)
    else:
        if getattr(model, _PACKING, "auto") == "require":
            raise _required(model, fault, reach, before)
        packed = before.packed if before else _packed_up_to(model, ways.packed, lengths, reach)
        while True:
            if not packed:
                use_own_attention(model)
            unfit = _fault(model, ways.alone, examples, looks_ahead=True)
            if not unfit or not packed:
                break
            packed = 0.0  # it may only know its own attention by name
        if unfit:
            raise _refusal(model, f"in packed rows {fault}; one sequence a forward {unfit}")
        standing = Standing(packed, holds, fault)
        if before is None or not before.fault:
            _announce(model, standing)
    setattr(model, _STANDING, standing)
    return standing


def fits_a_row(model: PreTrainedModel, ways: Ways, batch: PackedBatch) -> bool:
    """Tell whether to score a batch as one packed row; verify it where that is not known.

    Returns:
        ``False`` for a batch that is to be scored one sequence a forward.

    Raises:
        AlignkitError: As `verify_scores` does.
    """
    standing: Standing | None = getattr(model, _STANDING, None)
    if standing is None:
        if model.config.model_type in TESTED:
            lengths = named_lengths(model)
            standing = Standing(packed=lengths[0] if lengths else math.inf)
            setattr(model, _STANDING, standing)
        else:
            standing = verify_scores(model, ways)
    if batch.longest <= standing.packed:
        return True
    if batch.longest > standing.alone:
        log.info("attention: probing sequences of %d tokens", batch.longest)
        standing = verify_scores(model, ways, batch.longest)
    return batch.longest <= standing.packed


def is_never_packed(model: PreTrainedModel) -> bool:
    """Tell whether a model was found to be scored one sequence a forward, whatever the length."""
    standing: Standing | None = getattr(model, _STANDING, None)
    return standing is not None and bool(standing.fault) and not standing.packed


def set_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Say whether a model may be scored one sequence a forward; forget what was proved of it."""
    setattr(model, _PACKING, packing)
    if hasattr(model, _STANDING):
        delattr(model, _STANDING)


def _fault(
    model: PreTrainedModel, score: Score, examples: list[Example], looks_ahead: bool = False
) -> str | None:
    try:
        return find_fault(model, score, examples, looks_ahead)
    except (AlignkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers' many models raise
        reason = f"its own forward fails on tokens alone ({reason_of(error)})"
        raise _refusal(model, reason) from error


def _packed_up_to(
    model: PreTrainedModel, score: Score, lengths: Sequence[int], reach: int
) -> float:
    """The largest length up to which rows are right; 0 for a model that no row holds."""
    candidates = [length for length in lengths if SHORTEST <= length < reach]

    def is_wrong(length: int) -> bool:
        return _fault(model, score, probe_examples(model, length, length)) is not None

    count = bisect_left(candidates, True, key=is_wrong)
    return candidates[count - 1] if count else 0.0


def _announce(model: PreTrainedModel, standing: Standing) -> None:
    beyond = f", from sequences of more than {standing.packed} tokens on" if standing.packed else ""
    log.warning(
        "model: %s is scored one sequence a forward%s, which takes longer: in packed rows %s",
        type(model).__name__, beyond, standing.fault,
    )  # fmt: skip


def _required(
    model: PreTrainedModel, fault: str, reach: int, before: Standing | None
) -> AlignkitError:
    if before is not None and before.packed:
        return AlignkitError(
            f"data: a sequence of {reach} tokens is longer than the {before.packed} up to which "
            f"packed rows are right for this model; lower data.max_length to {before.packed}, or "
            f"set model.packing to auto ({fault})"
        )
    return AlignkitError(
        f"model.packing=require: {type(model).__name__} cannot be scored in packed rows: {fault}; "
        "set it to auto to score one sequence a forward, or use another model"
    )


def _refusal(model: PreTrainedModel, reason: str) -> AlignkitError:
    return AlignkitError(
        f"model: {type(model).__name__} cannot be scored: {reason}; use another model (gpt2, "
        "gpt_neox and llama are tested)"
    )
