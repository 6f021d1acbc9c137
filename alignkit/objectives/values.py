"""Check what a loss returns, and write its parameters as plain values, whoever wrote the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from alignkit.errors import AlignkitError


def one_each(values: Any, scores_B: Tensor, loss: object, what: str = "loss") -> Tensor:
    """Return what a loss gave, if it is one number for each pair or answer.

    Another shape may well broadcast: [B, 1] against [B] mixes the pairs, a mean counts each of
    them B times.

    Args:
        values: What was returned.
        scores_B: [B], scores that it was computed from.
        loss: The loss or the module that made them, for the error.
        what: What was asked for: its ``loss``, or its ``reward``.

    Raises:
        AlignkitError: It is no tensor, has another shape, or carries no gradient of the scores.
    """
    shape = list(scores_B.shape)
    rule = f"{type(loss).__name__}: must return one {what} a pair or answer, {shape}, "
    if not isinstance(values, Tensor):
        raise AlignkitError(f"{rule}and returned a {type(values).__name__}")
    if values.shape != scores_B.shape:
        raise AlignkitError(f"{rule}and returned {list(values.shape)}")
    if what == "loss" and scores_B.requires_grad and not values.requires_grad:
        raise AlignkitError(f"{rule}and returned one without gradient; leave out .detach()")
    return values


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
        return type(value)(rebuilt(each, make) for each in value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.to_dict() if hasattr(value, "to_dict") else value
