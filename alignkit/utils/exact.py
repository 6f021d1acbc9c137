"""Add up in float64, where the device has it."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums on a device are kept: float64, which Apple's MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact(values: Tensor) -> Tensor:
    """Return values in the dtype of sums on their device."""
    return values.to(exact_dtype(values.device))
