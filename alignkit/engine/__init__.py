"""The engine: packed rows in, token log-probabilities out. Plain PyTorch, no Lightning."""

from alignkit.batch import Example, PackedBatch, Span, collate
from alignkit.engine.compile import compile_blocks
from alignkit.engine.head import TokenScores
from alignkit.engine.onednn import bound_caches
from alignkit.engine.proof import Packing
from alignkit.engine.score import (
    check_engine,
    response_lengths,
    response_means,
    response_sums,
    score,
    score_with_stats,
)

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
    "response_lengths",
    "response_means",
    "response_sums",
    "score",
    "score_with_stats",
]
