"""Write and read checkpoint files for Lightning's trainer, whole and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from alignkit.models.archive import local_path, write_archive
from alignkit.models.find import load_checkpoint


class SealedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints as sealed archives in one step, and refuse damaged ones on reading.

    Lightning's own plugin fills a file in the temporary folder and moves it. On another file system
    that is a copy, and a killed process or a full disk leaves half a file under the final name.
    Lightning still writes to URLs.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; see `CheckpointIO.save_checkpoint`.

        Raises:
            AlignkitError: The file cannot be written.
        """
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_archive(local, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, or the newest one in a run's folder, without unpickling objects.

        Raises:
            AlignkitError: It is missing, damaged, or holds more than plain values and tensors.
        """
        return load_checkpoint(path)


def seal_checkpoints(trainer: Trainer) -> None:
    """Let a trainer read and write through `SealedCheckpointIO`, unless it was given a plugin.

    A plugin that wraps another one, such as ``AsyncCheckpointIO``, then wraps ours.
    """
    strategy = trainer.strategy
    io: CheckpointIO | None = strategy.checkpoint_io
    around = None
    while isinstance(io, _WrappingCheckpointIO):
        around, io = io, io.checkpoint_io
    if type(io) is not TorchCheckpointIO:
        return
    if around is None:
        strategy.checkpoint_io = SealedCheckpointIO()
    else:
        around._checkpoint_io = SealedCheckpointIO()
