"""Find numbers that are none, by the name of the tensor that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from alignkit.errors import AlignkitError


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, ``None`` where none does."""
    return next((name for name, tensor in tensors if not _is_finite(tensor)), None)


def refuse_nonfinite_weights(model: nn.Module, where: str, advice: str) -> None:
    """Refuse a model with a weight that is no number, or none in the dtype it is in.

    Args:
        model: Whose parameters are looked at.
        where: Begins the message: what the model is.
        advice: Ends it: what to do.

    Raises:
        AlignkitError: There is one; the message names it and its dtype.
    """
    weights = dict(model.named_parameters())
    name = first_nonfinite(weights.items())
    if name is not None:
        dtype = str(weights[name].dtype).removeprefix("torch.")
        raise AlignkitError(f"{where}: {name} holds NaN or infinity in {dtype}; {advice}")


def nested_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within mappings and lists, by the way to them: ``state.0.exp_avg``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from nested_tensors(inner, f"{name}.{key}" if name else str(key))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # One pass without a copy; either end is NaN where any number is.
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())
