"""Let a whole scoring of a batch count as one call of the model.

The engine calls a model's backbone and reads the weight of its head. A strategy that keeps weights
elsewhere until a model is called would see neither, and may ask here to be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from alignkit.engine.head import TokenScores

_METHOD = "_alignkit_call"
"""Attribute of a model whose scorings count as calls."""

Result = TypeVar("Result", Tensor, TokenScores)


def call_as_one(model: nn.Module, register: Callable[[nn.Module, str], Any]) -> None:
    """Let each scoring of a model count as a call of it.

    Args:
        model: Changed in place.
        register: Makes a method of a module, given by name, one that counts as its forward.
    """
    setattr(model, _METHOD, _compute)
    register(model, _METHOD)


def in_one_call(model: nn.Module, compute: Callable[[], Result]) -> Result:
    """Compute something of a model, as one call of it where that was asked for.

    Args:
        model: The model whose parts and weights are used.
        compute: Returns a tensor or `TokenScores`.
    """
    call: Callable[[Callable[[], Any]], Any] | None = getattr(model, _METHOD, None)
    if call is None:
        return compute()
    # FSDP2 finds the tensors of an output in containers, and not in dataclasses of ours.
    found = call(lambda: _as_tuple(compute()))
    return TokenScores(*found) if isinstance(found, tuple) else found  # type: ignore[return-value]


def _compute(compute: Callable[[], Any]) -> Any:
    return compute()


def _as_tuple(found: Any) -> Any:
    if isinstance(found, TokenScores):
        return found.logps, found.correct, found.entropy, found.collision
    return found
