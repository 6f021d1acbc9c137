"""Write ``last.ckpt`` at every validation and at the end of training."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path
from alignkit.modules.runs import named_checkpoint, run_folder
from alignkit.utils.atomic import make_writable_folder


class Checkpoint(ModelCheckpoint):
    """Save checkpoints as `ModelCheckpoint` does, and ``last.ckpt`` at every validation.

    With ``save_last``, ``last.ckpt`` is also written at the end of training. Lightning 2.6 rewrites
    it only where the monitored value improved, so that the next stage, or a resumed run, would
    silently start from an older step.

    Without ``dirpath``, checkpoints are written into the run's own folder, ``version_N``, beside
    its config.yaml and events, so that no run overwrites the files of another. Where a logger gives
    two runs one folder, the second run writes ``last-v1.ckpt``, as Lightning counts.
    """

    _saved_weights: list[tuple[int, int]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder for the checkpoints of a fit, and test that it can be written to.

        Raises:
            AlignkitError: It cannot be written to; raised on every rank.
        """
        if stage != "fit":
            return
        problem: str | None = None
        shared, own = False, self.dirpath is None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                self.dirpath = self.dirpath or run_folder(trainer)
                local = local_path(self.dirpath)
                if local is not None:
                    make_writable_folder(local)
                    shared = own and _is_anothers(local, trainer)
            except AlignkitError as error:
                problem = str(error)
        problem, self.dirpath, shared = trainer.strategy.broadcast((problem, self.dirpath, shared))
        if problem is not None:
            raise AlignkitError(problem)
        if shared:
            self._enable_version_counter = True  # last-v1.ckpt, beside the other run's
        with warnings.catch_warnings():
            # The run's own folder always holds its events and its configuration already.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoint so far, unless its file is gone, and keep this run's folder.

        The earlier run's files stay: Lightning removes files from its own ``dirpath`` alone.
        """
        best = local_path(state_dict["best_model_path"])
        if best is None or best.is_file():
            super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best checkpoint as Lightning does, then ``last.ckpt``.

        Where Lightning looks for the best one at the end of the epoch, which follows, ``last.ckpt``
        waits for it: Lightning saves nothing at a step at which something was saved.
        """
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or not self._should_save_on_train_epoch_end(trainer):
            self._write_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best checkpoint where Lightning does it now, then ``last.ckpt``."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, whether or not a validation followed it.

        A step that was saved before is saved again if its weights have been replaced since, as
        weight averaging does at the end of training.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # where Lightning's own writes one nevertheless
        if self._saved_weights not in (None, _weight_versions(pl_module)):
            self._last_global_step_saved = -1
        super().on_train_end(trainer, pl_module)
        self._write_last(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_weights = _weight_versions(trainer.lightning_module)

    def _write_last(self, trainer: Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Return the files that ``ckpt_path="last"`` stands for in Python: the run's newest.

        Raises:
            AlignkitError: There is no checkpoint, or none that is intact.
        """
        # With this callback Lightning also asks where the user has not, and may find no file.
        unasked = any(isinstance(c, OnExceptionCheckpoint) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if unasked or (self.dirpath and local_path(self.dirpath) is None):
            return super()._find_last_checkpoints(trainer)
        return {named_checkpoint(trainer, "last")}


def _is_anothers(folder: Path, trainer: Trainer) -> bool:
    """Return whether a folder has checkpoints of a run that this one does not go on from.

    A logger that was given its version writes into the same folder again.
    """
    start = local_path(trainer.ckpt_path) if trainer.ckpt_path else None
    goes_on = start is not None and start.absolute().parent == folder.absolute()
    numbered = start is not None and re.search(r"-v\d+$", start.stem)  # beside another run's
    return any(folder.glob("*.ckpt")) and not (goes_on and not numbered)


def _weight_versions(module: LightningModule) -> list[tuple[int, int]]:
    """Return a value that changes whenever a trained parameter is replaced or written to."""
    return [(id(p), p._version) for p in module.parameters() if p.requires_grad]
