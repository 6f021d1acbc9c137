"""One short DPO run, with whatever of Lightning's is to be tried beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from alignkit.data import HHPreferenceDataModule
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule
from tests.modules.helpers import trainer


class Run:
    """A module, its data, and what training it has shown.

    Attributes:
        losses: Of every optimizer step, in order.
        module, data, trainer: Of the run.
    """

    def __init__(self, base: Path, hh: Path, directory: Path, **options: Any) -> None:
        torch.manual_seed(1)
        self.directory = directory
        self.losses: list[float] = []
        self.module = DPOModule(
            str(base),
            **{
                "lora": LoRAConfig(targets="all-linear", dropout=0.1),
                "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
                "schedule": "cosine",
                **options.pop("module", {}),
            },
        )
        few = {"tokens_per_batch": 700, "max_train_examples": 20, "max_val_examples": 4}
        self.data = HHPreferenceDataModule(str(base), str(hh), **{**few, **options.pop("data", {})})
        log = self.module._log

        def keep(name: str, value: Any, **kwargs: Any) -> None:
            self.losses.extend([float(value)] if name == "train/loss" else [])
            log(name, value, **kwargs)

        self.module._log = keep  # type: ignore[method-assign]
        self.trainer: Trainer = trainer(directory, **{"max_epochs": 2, **options})

    def fit(self, ckpt: Path | str | None = None) -> Run:
        """Train; from a checkpoint as a user would, after drawing something else."""
        torch.manual_seed(7 if ckpt else 2)
        self.trainer.fit(self.module, self.data, ckpt_path=ckpt)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        """What has been trained."""
        return {k: v.clone() for k, v in self.module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
