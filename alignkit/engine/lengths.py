"""At which lengths a model may begin to compute something else, read off its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

# What numbers of a configuration mean that are no lengths: widths, counts, ids and scales. Any
# other number counts as a length, so that a window is not missed for its name.
_NO_LENGTH = re.compile(
    r"vocab|hidden_size|intermediate|embed|embd|_dim|dim_|d_model|dff|ffn|inner|feed_forward"
    r"|head|layer|rank|expert|group|state|conv|kernel|width|theta|scal|seed|token|_id$|_ids$"
    r"|image|patch|audio|vision|dtype|quant|version|label|bucket|beam|summary|^num_|_period|_tp$",
    re.IGNORECASE,
)
# What families call the number of their positions; the first that a configuration has counts.
_POSITIONS = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_seq_len",
    "model_max_length",
)
# Numbers that have such a word in their name and are lengths all the same.
_LENGTH = re.compile(r"original_max|window|chunk|floor|top_?k$|_len(gth)?$")


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the configuration of a model's text part, its own where it has several."""
    try:
        return model.config.get_text_config()
    except ValueError:
        return model.config


def longest_position(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has, ``None`` where its configuration does not say."""
    config = text_config(model)
    for name in _POSITIONS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def named_lengths(model: PreTrainedModel) -> list[int]:
    """Return the lengths beyond which a model may attend, rotate or choose differently, sorted.

    Windows, chunks, the k of a top-k, the positions before a rotary embedding is stretched:
    sequences up to such a length say nothing about longer ones.
    """
    limit = longest_position(model)
    found = set(_numbers(text_config(model).to_dict()))
    return sorted(length for length in found if length > 0 and (limit is None or length < limit))


def _numbers(value: Any, name: str = "") -> Iterator[int]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, str(key))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        is_length = _LENGTH.search(name) or not _NO_LENGTH.search(name)
        if is_length and name not in _POSITIONS:
            yield value
