"""Check what a loss returns, and write its parameters as plain values, whoever wrote the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import AlignkitError


def one_each(values: Any, scores_B: Tensor | None, loss: object, what: str = "loss") -> Tensor:
    """Return what a loss gave, if it is one number for each pair or answer.

    Another shape may well broadcast: [B, 1] against [B] mixes the pairs, a mean counts each of
    them B times.

    Args:
        values: What was returned.
        scores_B: [B], scores that it was computed from; ``None`` where their number is not known.
        loss: The loss or the module that made them, for the error.
        what: What was asked for: its ``loss``, or its ``reward``.

    Raises:
        AlignkitError: It is no tensor, has another shape, or carries no gradient of the scores.
    """
    shape = "" if scores_B is None else f" {list(scores_B.shape)},"
    rule = f"{type(loss).__name__}: must return one {what} a pair or answer,{shape} and returned "
    if not isinstance(values, Tensor):
        raise AlignkitError(f"{rule}a {type(values).__name__}")
    if values.dim() != 1 or (scores_B is not None and len(values) != len(scores_B)):
        raise AlignkitError(f"{rule}{list(values.shape)}")
    is_trained = scores_B is not None and scores_B.requires_grad and torch.is_grad_enabled()
    if what == "loss" and is_trained and not values.requires_grad:
        raise AlignkitError(f"{rule}one without gradient; leave out .detach()")
    return values


def has_fields(kind: type) -> bool:
    """Tell whether objects of a class are made of the fields of a dataclass alone.

    Example:
        >>> has_fields(int)
        False
    """
    maker = next(each for each in kind.__mro__ if "__init__" in vars(each))
    return "__dataclass_fields__" in vars(maker)


def plain_fields(loss: Any) -> dict[str, Any]:
    """Return the parameters of a loss as plain values, those of losses inside it as well."""
    return {each.name: _plain(getattr(loss, each.name)) for each in fields(loss)}


def rebuilt(value: Any, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return parameters of which `plain_fields` has made plain values.

    Args:
        value: A parameter, or all of them by their names.
        make: Makes a loss of its class path and parameters.
    """
    if isinstance(value, Mapping):
        if "class_path" in value:
            return make(value)
        return {name: rebuilt(each, make) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return _alike(value, [rebuilt(each, make) for each in value])
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return _alike(value, list(map(_plain, value)))
    return value


def _alike(value: list[Any] | tuple[Any, ...], changed: list[Any]) -> list[Any] | tuple[Any, ...]:
    """Return what became of a list or tuple as the same of the two; a named tuple is a tuple."""
    return changed if isinstance(value, list) else tuple(changed)
