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
from alignkit.modules import RewardModule

_CLOCK = 0.1  # seconds by which a file system's clock may be behind


def closing_lines(
    trainer: Trainer, folder: str | None, since: float, trained: bool = True
) -> Iterator[str]:
    """Yield lines about what a fit wrote, the next command and the curves.

    Args:
        trainer: The trainer, after training.
        folder: As `logged_folder` returns it, which only all ranks together may ask for.
        since: When the fit began, in seconds since the epoch: older files are another run's.
        trained: Whether a step was left to train.
    """
    files = [Path(path) for path in _checkpoints(trainer)]
    home = local_path(folder) if folder else None
    files += [home / "config.yaml"] if home is not None else []
    folders: dict[Path, list[str]] = {}
    for file in files:
        known = folders.get(file.parent, ())
        if file.is_file() and file.stat().st_mtime > since - _CLOCK and file.name not in known:
            folders.setdefault(file.parent, []).append(file.name)
    for place, names in folders.items():
        yield f"wrote {_shown(place)}: {', '.join(names)}"
    kept = next((place for place, names in folders.items() if _has_weights(names)), None)
    if not trained:
        yield (
            f"nothing was left to train: the run is at step {trainer.global_step} already; give it "
            "more epochs or steps to go on"
        )
    elif kept is None and (elsewhere := _checkpoints(trainer, local=False)):
        yield f"wrote {', '.join(elsewhere)}"
    elif kept is None:
        yield "wrote no checkpoint, as the trainer was told"
    else:
        model = shlex.quote(_shown(kept))
        is_reward = isinstance(trainer.lightning_module, RewardModule)
        yield f"next: alignkit {f'judge FILE --model {model}' if is_reward else f'chat {model}'}"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield f"curves: tensorboard --logdir {shlex.quote(_shown(Path(logger.root_dir)))}"


def _checkpoints(trainer: Trainer, local: bool = True) -> list[str]:
    """Return the last and best checkpoints on this machine's file systems, or those at URLs."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [path for c in savers for path in (c.last_model_path, c.best_model_path) if path]
    return [path for path in dict.fromkeys(paths) if (local_path(path) is not None) == local]


def _has_weights(names: list[str]) -> bool:
    return any(name.endswith(".ckpt") for name in names)


def _shown(path: Path) -> str:
    """Return a path as one would type it here."""
    inside = os.path.relpath(path)
    return str(path) if inside.startswith("..") else inside
