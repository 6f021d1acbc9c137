"""What autocast does to a dtype, and how to keep it out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(device_type: str, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products on a type of device: autocast's where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return otherwise


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for a type of device.

    Entering autocast's own costs as much as a small product, so that is done only where it is on.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
