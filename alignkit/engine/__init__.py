"""Compute the log-probability of every scored token of a packed row, in plain PyTorch."""

from alignkit.batch import Example, PackedBatch, Span, collate
from alignkit.engine.compile import blocks_of, compile_blocks
from alignkit.engine.head import TokenScores
from alignkit.engine.onednn import bound_caches
from alignkit.engine.score import (
    check_engine,
    response_lengths,
    response_means,
    response_sums,
    score,
    score_with_stats,
    states_at,
)
from alignkit.engine.verify import Packing, needs_no_probe
from alignkit.engine.whole import call_as_one

bound_caches()

__all__ = [
    "Example",
    "PackedBatch",
    "Packing",
    "Span",
    "TokenScores",
    "blocks_of",
    "call_as_one",
    "check_engine",
    "collate",
    "compile_blocks",
    "needs_no_probe",
    "response_lengths",
    "response_means",
    "response_sums",
    "score",
    "score_with_stats",
    "states_at",
]
