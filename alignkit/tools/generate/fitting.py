"""Refuse prompts that a model cannot answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size


def check_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse prompts whose ids are beyond the model's embeddings.

    Raises:
        AlignkitError: One is.
    """
    size = embedding_size(model)
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= size:
        raise AlignkitError(
            f"prompts: the tokenizer gives the id {largest:,} and the model has {size:,} "
            "embeddings; pass the tokenizer that belongs to the model"
        )


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], new: int) -> None:
    """Refuse prompts that are empty, or too long together with an answer of ``new`` tokens.

    Raises:
        AlignkitError: One is.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    for index, length in enumerate(lengths):
        if length == 0:
            raise AlignkitError(f"prompts: prompt {index + 1} is empty; give it some text")
        if context is not None and length + new > context:
            raise AlignkitError(
                f"prompts: prompt {index + 1} has {length} tokens, and with max_new_tokens {new} "
                f"passes the model's context of {context}; shorten it or max_new_tokens"
            )
