"""Read off a model's configuration at which lengths it may begin to compute differently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

# Names of a configuration's numbers that are no lengths: widths, counts, ids and scales. Any other
# number counts as a length, so that a window with an unusual name is not missed.
_OTHER_NUMBER_NAMES = re.compile(
    r"vocab|hidden_size|intermediate|embed|embd|_dim|dim_|d_model|dff|ffn|inner|feed_forward"
    r"|head|layer|rank|expert|group|state|conv|kernel|width|theta|scal|seed|token|_id$|_ids$"
    r"|image|patch|audio|vision|dtype|quant|version|label|bucket|beam|summary|^num_|_period|_tp$",
    re.IGNORECASE,
)
# Names of the number of positions in different families; the first one that is there counts.
_POSITION_LIMIT_NAMES = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_seq_len",
    "model_max_length",
)
# Names of numbers that are lengths although the first pattern matches them.
_LENGTH_NAMES = re.compile(r"original_max|window|chunk|floor|top_?k$|_len(gth)?$")


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the configuration of a model's text part, its own where it has several."""
    try:
        return model.config.get_text_config()
    except ValueError:
        return model.config


def longest_position(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has, ``None`` where its configuration does not say."""
    config = text_config(model)
    for name in _POSITION_LIMIT_NAMES:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def named_lengths(model: PreTrainedModel) -> list[int]:
    """Return the lengths beyond which a model may attend, rotate or choose differently, sorted.

    Such lengths are windows, chunks, the k of a top-k and the positions before a rotary embedding
    is stretched. Sequences up to such a length say nothing about longer ones.
    """
    limit = longest_position(model)
    found = set(_lengths_in(text_config(model).to_dict()))
    return sorted(length for length in found if length > 0 and (limit is None or length < limit))


def _lengths_in(value: Any, name: str = "") -> Iterator[int]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _lengths_in(part, str(key))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _lengths_in(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        is_length = _LENGTH_NAMES.search(name) or not _OTHER_NUMBER_NAMES.search(name)
        if is_length and name not in _POSITION_LIMIT_NAMES:
            yield value
