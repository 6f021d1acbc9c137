"""Read ``--model.optimizer NAME`` as PyTorch's optimizer of that name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FLAGS = ("--model.optimizer", "--model.optimizer.class_path", "--model.optimizer.help")


def spell_out_optimizers(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the class path of PyTorch's optimizers in place of their names.

    Other packages have optimizers of the same names: once one of them is imported, bitsandbytes
    say, the parser would find ``SGD`` and ``AdamW`` ambiguous.
    """
    spelled: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, name = argument.partition("=")
        if previous in _FLAGS:
            argument = _class_path(argument)
        elif equals and flag in _FLAGS:
            argument = f"{flag}={_class_path(name)}"
        spelled.append(argument)
    return spelled


def _class_path(name: str) -> str:
    kind = getattr(torch.optim, name, None)
    is_optimizer = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return f"torch.optim.{name}" if is_optimizer else name
