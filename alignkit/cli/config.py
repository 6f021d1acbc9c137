"""Save the configuration of a run beside its other files."""

from __future__ import annotations

import os
from itertools import count

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from alignkit.models.archive import local_path
from alignkit.modules.runs import logged_folder
from alignkit.utils.atomic import write_atomically


class SaveConfig(SaveConfigCallback):
    """Save ``config.yaml`` into the folder of a run, and never overwrite a file of that name.

    Lightning's own callback ends a second run in the same folder with an error. Here the second
    configuration is named ``config-v1.yaml``, as Lightning numbers checkpoints. Without a logger
    that numbers runs this one has no folder of its own, and nothing is saved: Lightning would take
    the working folder, among the user's own files.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration beside the run's events, on rank 0, once."""
        if self.already_saved or trainer.logger is None:
            return
        self.already_saved = True
        folder = logged_folder(trainer)
        if trainer.is_global_zero and folder is not None:
            self._save(folder)

    def _save(self, folder: str) -> None:
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        stem, ending = os.path.splitext(self.config_filename)
        for version in count():
            name = f"{stem}-v{version}{ending}" if version else self.config_filename
            path = os.path.join(folder, name)
            if not files.exists(path):
                local = local_path(path)
                if local is not None:
                    write_atomically(local, text)
                else:
                    files.write_text(path, text, encoding="utf-8")
                return
