"""Take a module's loss: as it was given, or from the plain values of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import AlignkitError


def given_loss(loss: Any, kind: Any, example: str) -> Any:
    """Return the loss of a module, before anything is loaded.

    Args:
        loss: What was given: the loss, or what its ``to_dict`` returned, as in a checkpoint.
        kind: The class of the losses that the module takes.
        example: One of them as one writes it.

    Raises:
        AlignkitError: It is no such loss, or no dataclass, of which checkpoints hold the fields.
    """
    if isinstance(loss, Mapping):
        loss = kind.from_dict(loss)
    if not isinstance(loss, kind):
        raise AlignkitError(f"model.loss: give a loss such as {example}, not {loss!r}")
    if not hasattr(loss, "__dataclass_fields__"):
        raise AlignkitError(
            f"model.loss {type(loss).__name__}: put @dataclass(frozen=True) above its class, as "
            "checkpoints hold the fields"
        )
    return loss
