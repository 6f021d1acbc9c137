"""Refuse a stage's command whose configuration trains by the module of another one."""

from __future__ import annotations

from collections.abc import Sequence

import alignkit
from alignkit.cli.named import named_class
from alignkit.cli.stages import STAGES
from alignkit.errors import AlignkitError
from alignkit.modules import AlignmentModule


def check_stage(name: str, arguments: Sequence[str]) -> None:
    """Refuse the module of another stage, or another one of the package.

    Args:
        name: The stage.
        arguments: What its command stands for, with its configurations.

    Raises:
        AlignkitError: The module is another one; the right command is named.
    """
    kind = named_class(arguments, "model", AlignmentModule)
    own = {stage: getattr(alignkit, each.model) for stage, each in STAGES.items()}
    if kind is AlignmentModule or issubclass(kind, own[name]):
        return
    right = next((stage for stage, module in own.items() if issubclass(kind, module)), "fit")
    if right == "fit" and not kind.__module__.startswith(f"{alignkit.__name__}."):
        return  # a user's own
    raise AlignkitError(
        f"{name}: the configuration trains by {kind.__name__}, not {own[name].__name__}; run it by "
        f"alignkit {right}"
    )
