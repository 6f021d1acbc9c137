"""Turn settings into values that a checkpoint holds without pickling them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

_KINDS = (bool, int, float, str)


def plain(value: Any) -> Any:
    """Return a setting by values of Python's own types, not of their subclasses.

    A member of an ``Enum`` that is also a text, or NumPy's float64, which is also a float, would be
    pickled, and a checkpoint that holds one cannot be read. What is none of these stays as it is.

    Example:
        >>> from pathlib import Path
        >>> plain({"base": Path("gpt2"), "rates": (np.float64(0.5), True)})
        {'base': 'gpt2', 'rates': (0.5, True)}
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(plain(each) for each in value)
    for own in _KINDS:
        if isinstance(value, own):
            return own(value)
    return value


def without_objects(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint holds without pickling them, as `plain` makes them."""
    made = {name: plain(value) for name, value in settings.items()}
    return {name: value for name, value in made.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    plain_torch = (torch.Tensor, torch.dtype, torch.device)
    return value is None or type(value) in _KINDS or isinstance(value, plain_torch)
