"""Tell at the end of a fit what it wrote, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from alignkit.models.archive import local_path


def closing_lines(trainer: Trainer) -> Iterator[str]:
    """Yield lines about what a fit wrote, the next command and the curves.

    Args:
        trainer: The trainer, after training.
    """
    files = [Path(path) for path in _checkpoints(trainer)]
    files += [folder / name for folder in _log_folders(trainer) for name in ("config.yaml",)]
    folders: dict[Path, list[str]] = {}
    for file in files:
        if file.is_file() and file.name not in folders.get(file.parent, ()):
            folders.setdefault(file.parent, []).append(file.name)
    for folder, names in folders.items():
        yield f"wrote {_shown(folder)}: {', '.join(names)}"
    kept = next((folder for folder, names in folders.items() if _has_weights(names)), None)
    if kept is None:
        yield "wrote no checkpoint, as the trainer was told"
    else:
        model = shlex.quote(_shown(kept))
        yield f"next: alignkit chat {model}"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield f"curves: tensorboard --logdir {shlex.quote(_shown(Path(logger.root_dir)))}"


def _checkpoints(trainer: Trainer) -> Iterator[str]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in (callback.last_model_path, callback.best_model_path):
                if path and local_path(path) is not None:
                    yield path


def _log_folders(trainer: Trainer) -> Iterator[Path]:
    folder = local_path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None
    if folder is not None:
        yield folder


def _has_weights(names: list[str]) -> bool:
    return any(name.endswith(".ckpt") for name in names)


def _shown(path: Path) -> str:
    """Return a path as one would type it here."""
    inside = os.path.relpath(path)
    return str(path) if inside.startswith("..") else inside
