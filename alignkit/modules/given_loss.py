"""Take a module's loss: as it was given, or from the plain values of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.objectives.pairs import PreferenceLoss
from alignkit.objectives.values import has_fields


def given_loss(loss: Any, kind: Any, example: str) -> Any:
    """Return the loss of a module, before anything is loaded.

    Args:
        loss: What was given: the loss, or what its ``to_dict`` returned, as in a checkpoint.
        kind: The class of the losses that the module takes.
        example: One of them as one writes it.

    Raises:
        AlignkitError: It is no such loss, or one that checkpoints would not hold: no dataclass, or
            a subclass of a loss that is kept without its class.
    """
    if isinstance(loss, Mapping):
        loss = kind.from_dict(loss)
    if not isinstance(loss, kind):
        raise AlignkitError(f"model.loss: give a loss such as {example}, not {loss!r}")
    name = type(loss).__name__
    if not has_fields(type(loss)):
        raise AlignkitError(
            f"model.loss {name}: put @dataclass(frozen=True) above its class, and fields in the "
            "place of __init__, as checkpoints hold the fields"
        )
    if kind is not PreferenceLoss and type(loss) is not kind:
        raise AlignkitError(
            f"model.loss {name}: checkpoints hold the parameters of {kind.__name__} alone; "
            "override compute_loss of the module in its place"
        )
    return loss
