"""Find tensors that hold NaN or infinity, and name them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.utils.deferred import actual


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, ``None`` if none does.

    Args:
        tensors: Pairs of a name and a tensor.

    Example:
        >>> import torch
        >>> first_nonfinite([("a", torch.ones(2)), ("b", torch.tensor([0.0, torch.nan]))])
        'b'
    """
    return next((name for name, tensor in tensors if not _is_finite(tensor)), None)


def refuse_nonfinite_weights(model: nn.Module, where: str, advice: str) -> None:
    """Refuse a model with a parameter that holds NaN, or infinity in the dtype it is stored in.

    Args:
        model: The model to check.
        where: The start of the message: what the model is.
        advice: The end of the message: what to do.

    Raises:
        AlignkitError: A parameter is not finite; the message names it and its dtype.
    """
    weights = dict(model.named_parameters())
    name = first_nonfinite((name, actual(value)) for name, value in weights.items())
    if name is not None:
        dtype = str(weights[name].dtype).removeprefix("torch.")
        raise AlignkitError(f"{where}: {name} holds NaN or infinity in {dtype}; {advice}")


def nested_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor within nested mappings and lists, with its path as its name.

    Args:
        value: A tensor, or nested mappings, lists and tuples; other values are skipped.
        name: The path that leads to ``value``.

    Example:
        >>> import torch
        >>> list(nested_tensors({"state": [{"step": torch.tensor(3)}]}))
        [('state.0.step', tensor(3))]
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from nested_tensors(inner, f"{name}.{key}" if name else str(key))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # One pass without a copy; the minimum and the maximum are NaN if any element is.
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())
