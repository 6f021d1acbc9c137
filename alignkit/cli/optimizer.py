"""Read ``--model.optimizer NAME`` as PyTorch's optimizer of that name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FLAG = "--model.optimizer"


def spell_out_optimizers(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the class path of PyTorch's optimizers in place of their names.

    Other packages have optimizers of the same names: once one of them is imported, bitsandbytes
    say, the parser would find ``SGD`` and ``AdamW`` ambiguous.
    """
    spelled: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if previous == _FLAG:
            argument = _class_path(argument)
        elif argument.startswith(f"{_FLAG}="):
            argument = f"{_FLAG}={_class_path(argument.removeprefix(f'{_FLAG}='))}"
        spelled.append(argument)
    return spelled


def _class_path(name: str) -> str:
    kind = getattr(torch.optim, name, None)
    is_optimizer = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return f"torch.optim.{name}" if is_optimizer else name
