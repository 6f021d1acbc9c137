"""How Lightning's trainer writes and reads checkpoint files, for any trainer our modules meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from alignkit.models.archive import local_path, write_archive
from alignkit.models.find import load_checkpoint


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes sealed archives in one step, and reads none that is damaged.

    Lightning's own fills a file in the temporary folder and moves it, which copies where that is
    another file system: a kill or a full disk then leaves half a file under the final name. To
    URLs it still writes by itself.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; as `CheckpointIO.save_checkpoint`.

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
    """Have a trainer read and write through `SealedCheckpointIO`, unless it has a way of its own.

    A plugin that wraps another one, as ``AsyncCheckpointIO`` does, keeps its place around it.
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
