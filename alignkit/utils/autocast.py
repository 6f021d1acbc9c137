"""Define half precision, query autocast's dtype, and turn autocast off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of half precision."""


def compute_dtype(device_type: str, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products: autocast's where it is on, else ``otherwise``.

    Args:
        device_type: Such as ``cpu`` or ``cuda``.
        otherwise: The dtype of the operands.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return otherwise


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for a type of device.

    Entering `torch.autocast` takes as long as a small matrix product, so it is entered only where
    autocast is on.

    Args:
        device_type: Such as ``cpu`` or ``cuda``.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
