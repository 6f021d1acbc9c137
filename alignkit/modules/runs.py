"""Choose the folder of a run, and find the checkpoints ``last``, ``best`` and ``hpc`` in it."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path, read_archive
from alignkit.models.find import first_intact, newest_first
from alignkit.models.shards import verify_checkpoint
from alignkit.modules.requeue import requeue_checkpoints
from alignkit.utils.ranks import is_first_rank

_VERSION = re.compile(r"version_(\d+)")

log = logging.getLogger(__name__)

CHECKPOINT_NAMES = ("last", "best", "hpc")
"""Names that Lightning takes in the place of a checkpoint's path."""


def claim_run_folder(trainer: Trainer) -> None:
    """Make the numbered folder that a logger has chosen, so that no other run takes it.

    A logger looks for a free number long before it writes. While data is being encoded, a second
    run would find the same number.
    """
    logger = trainer.logger
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
        return
    taken = None
    while _is_first(trainer) and (folder := local_path(logger.log_dir)) not in (None, taken):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run was quicker
            taken, logger._version = folder, None
        except OSError:  # the first write reports why it fails
            return
        else:
            return


def discard_empty_folders(trainer: Trainer) -> None:
    """Remove the folders that a failed run has made for itself and written nothing to."""
    if not _is_first(trainer):
        return
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    logger = trainer.logger
    named = [keeper.dirpath for keeper in keepers if keeper.dirpath]
    if isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is not None:
        named.append(logger.log_dir)  # without a number it would look for one, and warn
    for name in named:
        folder = local_path(name)
        if folder is not None and _VERSION.fullmatch(folder.name):
            with suppress(OSError):  # it is not empty, or not there
                folder.rmdir()
                folder.parent.rmdir()


def run_folder(trainer: Trainer) -> str:
    """Return the folder of this run: its logger's, or a new numbered one without a logger.

    The latter is made at once, so that no other run takes the number.

    Raises:
        AlignkitError: The folder cannot be made.
    """
    logger = trainer.logger
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return logger.log_dir
    root = runs_folder(trainer)
    if logger is not None and logger.version is not None:
        version = logger.version
        return os.path.join(root, version if isinstance(version, str) else f"version_{version}")
    place = local_path(root)
    return os.path.join(root, "version_0") if place is None else str(_new_folder(place))


def logged_folder(trainer: Trainer) -> str | None:
    """Return the folder of this run if a logger numbers it; every rank must call it.

    Lightning's ``trainer.log_dir`` is the folder of all runs for a logger other than TensorBoard's
    and CSV's, and nothing for MLflow's.
    """
    folder = None
    if trainer.is_global_zero and trainer.logger is not None and trainer.logger.version is not None:
        folder = run_folder(trainer)
    return trainer.strategy.broadcast(folder)


def runs_folder(trainer: Trainer) -> str:
    """Return the folder that holds the folders of this run and of earlier ones."""
    logger = trainer.logger
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return logger.root_dir
    if logger is None:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    return os.path.join(logger.save_dir or trainer.default_root_dir, logger.name or "")


def _is_first(trainer: Trainer) -> bool:
    """Tell whether a trainer is the first rank's, by its own word and by the environment.

    A machine of which the environment tells nothing but the number has no rank there. In a spawned
    or forked process the environment has the rank before the trainer has it.
    """
    return trainer.is_global_zero and is_first_rank()


def _new_folder(root: Path) -> Path:
    numbers = [_VERSION.fullmatch(path.name) for path in root.glob("version_*")]
    for number in count(max((int(match[1]) + 1 for match in numbers if match), default=0)):
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run was quicker
            continue
        except OSError as error:
            raise AlignkitError(
                f"{folder}: cannot be made ({error.strerror}); set trainer.default_root_dir"
            ) from error
        return folder
    raise AssertionError("there is always another number")


def asked_checkpoint(trainer: Trainer, asked: str | None) -> str | None:
    """Return the file that a command's ``ckpt_path`` stands for.

    Args:
        trainer: The command's trainer.
        asked: One of `CHECKPOINT_NAMES`; or a path or ``None``, which are returned as they are.

    Raises:
        AlignkitError: The name stands for no file, or for none that is intact.
    """
    return named_checkpoint(trainer, asked) if asked in CHECKPOINT_NAMES else asked


def named_checkpoint(trainer: Trainer, name: str) -> str:
    """Return the file that ``last``, ``best`` or ``hpc`` stands for in a run's folders.

    Args:
        trainer: The trainer, whose logger and checkpoint callbacks name the folders of runs.
        name: One of `CHECKPOINT_NAMES`.

    Raises:
        AlignkitError: There is no such file, or none that is intact.
    """
    asked = f"ckpt_path {name}"
    if name == "hpc":
        found = first_intact(requeue_checkpoints(Path(trainer.default_root_dir)), asked)
        where = f"{trainer.default_root_dir}/hpc_ckpt_*.ckpt"
    else:
        folders = checkpoint_folders(trainer)
        where = ", ".join(map(str, folders))
        candidates = (file for folder in folders for file in newest_first(folder))
        found = first_intact(candidates, asked, told=name != "best")
    if found is None:
        raise AlignkitError(
            f"{asked}: there is no checkpoint in {where}; give a file, or start without --ckpt_path"
        )
    return _best_checkpoint(found) if name == "best" else found


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders with checkpoints: those of the callbacks, or that of all runs."""
    given = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    places = [folder or runs_folder(trainer) for folder in given or [None]]
    return [path for place in dict.fromkeys(places) if (path := local_path(place)) is not None]


def _best_checkpoint(newest: str) -> str:
    """Return the best checkpoint that a run's newest one names, also if the run was moved."""
    states = read_archive(newest).get("callbacks", {}).values()
    best = next((s["best_model_path"] for s in states if s.get("best_model_path")), None)
    if best is None:
        raise AlignkitError(
            f"ckpt_path best: the run of {newest} has kept no best checkpoint; give a file, or a "
            "callback that monitors a metric"
        )
    for candidate in (Path(best), Path(newest).with_name(Path(best).name)):
        try:
            verify_checkpoint(candidate)
        except AlignkitError as error:
            damage = error
        else:
            if is_first_rank():
                log.info("ckpt_path best: taking %s", candidate)
            return str(candidate)
    log.warning("ckpt_path best: %s; taking the newest instead, %s", damage, newest)
    return newest
