"""Compute the log-probability of every scored token of a packed row, in plain PyTorch."""

from alignkit.batch import Example, PackedBatch, Span, collate
from alignkit.engine.compile import compile_blocks
from alignkit.engine.head import TokenScores
from alignkit.engine.onednn import bound_caches
from alignkit.engine.score import (
    check_engine,
    final_states,
    response_lengths,
    response_means,
    response_sums,
    score,
    score_with_stats,
)
from alignkit.engine.verify import Packing

bound_caches()

__all__ = [
    "Example",
    "PackedBatch",
    "Packing",
    "Span",
    "TokenScores",
    "check_engine",
    "collate",
    "compile_blocks",
    "final_states",
    "response_lengths",
    "response_means",
    "response_sums",
    "score",
    "score_with_stats",
]
