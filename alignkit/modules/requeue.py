"""Save for the job that SLURM starts again, and find what this very run has saved.

Lightning takes any ``hpc_ckpt_N.ckpt`` in the folder: that of another task of a job array, of an
earlier job or of another command of this one. And it fails where the folder holds a similar name.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from alignkit.data.read.hashes import digest_of
from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path, read_archive
from alignkit.models.find import first_intact, time_written
from alignkit.utils.ranks import is_first_rank

STATE = "slurm"
"""Key of what a callback's state in a checkpoint says of the job and the command that wrote it."""

log = logging.getLogger(__name__)


class CheckpointConnector(_CheckpointConnector):
    """Take no checkpoint that was not asked for, and in a SLURM job the one of rank 0."""

    @property
    def _hpc_resume_path(self) -> None:
        return None

    def resume_start(
        self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None
    ) -> None:
        """Read what rank 0 has found: the command lines of the tasks may differ."""
        if SLURMEnvironment.detect():
            checkpoint_path = self.trainer.strategy.broadcast(checkpoint_path)
        super().resume_start(checkpoint_path, weights_only)


def this_run() -> dict[str, str] | None:
    """Return what tells a SLURM job's run from all others, and stays when the job starts again.

    Returns:
        The job's id and a digest of its command line; ``None`` outside a job.
    """
    if not SLURMEnvironment.detect():
        return None
    return {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "command": digest_of("\0".join(sys.argv[1:]).encode("utf-8", "surrogateescape")),
    }


def requeue_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were written on SLURM's signal, the newest first."""
    numbered = {path: re.fullmatch(r"hpc_ckpt_(\d+)", path.stem) for path in folder.glob("*.ckpt")}
    found = {path: int(match[1]) for path, match in numbered.items() if match}
    return sorted(found, key=lambda path: found[path], reverse=True)


def own_checkpoint(trainer: Trainer, folders: Iterable[Path]) -> str | None:
    """Return the checkpoint that this run wrote on SLURM's signal, if there is one.

    Where the run was started again since and has written a later ``last.ckpt``, that one is taken.

    Args:
        trainer: The run's trainer.
        folders: Where its last checkpoints may lie.

    Raises:
        AlignkitError: There are some, and all are damaged.
    """
    run, home = this_run(), local_path(trainer.default_root_dir)
    if run is None or home is None:
        return None
    steps: dict[Path, int] = {}
    for path in requeue_checkpoints(home):
        writer, step = _writer(path)
        if writer == run:
            steps[path] = step
        elif writer.get("job") == run["job"] and is_first_rank():
            log.warning("%s: another command of this job wrote it; it is left alone", path)
    if steps:
        since = max(map(time_written, steps))
        for path in (path for folder in folders for path in folder.rglob("last*.ckpt")):
            writer, step = _writer(path) if time_written(path) > since else ({}, 0)
            steps |= {path: step} if writer == run else {}
    return first_intact(sorted(steps, key=lambda path: -steps[path]), "ckpt_path hpc")


def reserve_checkpoint(trainer: Trainer) -> str | None:
    """Return a new file for the job that is started again, on all ranks; every rank must call it.

    Its place is taken at once, as the tasks of an array may save at the same time.

    Returns:
        ``None`` where there is no place for it, which the log explains.
    """
    path, home = "", trainer.default_root_dir
    if trainer.is_global_zero:
        try:
            path = _reserve(local_path(home))
        except OSError as error:
            log.warning(
                "trainer.default_root_dir %s: holds no checkpoint to go on from (%s), so the job "
                "is not requeued; give a folder that can be written to",
                home, error.strerror or error,
            )  # fmt: skip
    return trainer.strategy.broadcast(path) or None


def _reserve(folder: Path | None) -> str:
    if folder is None:
        raise OSError("it is a URL")
    folder.mkdir(parents=True, exist_ok=True)
    newest = next(iter(requeue_checkpoints(folder)), None)
    for number in count(1 + (int(newest.stem.rpartition("_")[2]) if newest else 0)):
        path = folder / f"hpc_ckpt_{number}.ckpt"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:  # another task was quicker
            continue
        return str(path)
    raise AssertionError("there is always another number")


@contextmanager
def kept_if_whole(path: str, is_writer: bool) -> Iterator[None]:
    """Remove a reserved file again if it is not written."""
    try:
        yield
    except BaseException:
        if is_writer:
            Path(path).unlink(missing_ok=True)
        raise


def requeue_job() -> None:
    """Ask SLURM to start this job again; where that fails, the log says what to run."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    job = os.environ.get("SLURM_JOB_ID", "") if array is None else task
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
        failed = f"status {status}" if status else ""
    except OSError as error:
        failed = error.strerror or str(error)
    if failed:
        log.warning("scontrol requeue %s failed (%s); run it to go on", job, failed)
    else:
        log.info("requeued SLURM job %s", job)


def _writer(path: Path) -> tuple[dict[str, str], int]:
    """Return what a checkpoint says of the run that wrote it, and its step.

    There is nothing where it cannot be read.
    """
    try:
        content = read_archive(path, tensors=False, whole=False)
    except AlignkitError as error:
        if is_first_rank():
            log.warning("%s; it is passed over, whoever wrote it", error)
        return {}, 0
    states = content.get("callbacks", {}).values()
    writer: dict[str, str] = next((state[STATE] for state in states if STATE in state), {})
    return writer, int(content.get("global_step", 0))
