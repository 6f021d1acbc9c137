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
from itertools import count
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from alignkit.data.read.hashes import digest_of
from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path, read_archive
from alignkit.models.find import first_intact
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


def own_checkpoint(trainer: Trainer) -> str | None:
    """Return the newest checkpoint that this run wrote on SLURM's signal, if there is one.

    Raises:
        AlignkitError: There are some, and all are damaged.
    """
    run, folder = this_run(), local_path(trainer.default_root_dir)
    if run is None or folder is None:
        return None
    own = []
    for path in requeue_checkpoints(folder):
        writer = _writer(path)
        if writer == run:
            own.append(path)
        elif writer.get("job") == run["job"] and is_first_rank():
            log.warning("%s: another command of this job wrote it; it is left alone", path)
    return first_intact(own, "ckpt_path hpc")


def reserve_checkpoint(trainer: Trainer) -> str:
    """Return a new file for the job that is started again, on all ranks; every rank must call it.

    Its place is taken at once, as the tasks of an array may save at the same time.
    """
    path, folder = "", local_path(trainer.default_root_dir)
    if folder is None:
        return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        newest = next(iter(requeue_checkpoints(folder)), None)
        first = 1 + (int(newest.stem.rpartition("_")[2]) if newest else 0)
        for number in count(first):
            path = str(folder / f"hpc_ckpt_{number}.ckpt")
            try:
                Path(path).touch(exist_ok=False)
            except FileExistsError:  # another task was quicker
                continue
            break
    return str(trainer.strategy.broadcast(path))


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


def _writer(path: Path) -> dict[str, str]:
    """Return what a checkpoint says of the run that wrote it; nothing where it cannot be read."""
    try:
        states = read_archive(path, tensors=False).get("callbacks", {}).values()
    except AlignkitError as error:
        if is_first_rank():
            log.warning("%s; it is passed over, whoever wrote it", error)
        return {}
    return next((state[STATE] for state in states if STATE in state), {})
