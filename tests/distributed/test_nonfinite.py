"""A NaN on one of two gloo ranks stops both before the step, or is skipped by both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from alignkit import HHSFTDataModule
from alignkit.engine import PackedBatch
from alignkit.modules import SFTModule
from alignkit.modules.window import LossOutput
from tests.modules.helpers import sgd, trainer

ROWS = 24


class NaNOnRankOne(SFTModule):
    """The second micro-batch of rank 1 has a loss of NaN, and rank 0 never sees one."""

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        output = super().compute_loss(batch)
        if self.training and self.global_rank == 1 and self.global_step == 1:
            return LossOutput(output.loss_sum * float("nan"), output.weight)
        return output


class Witness(L.Callback):
    """Writes what a rank ends with: its error, or its parameters."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def on_exception(self, trainer: L.Trainer, _: Any, exception: BaseException) -> None:
        (self.home / f"error{trainer.global_rank}").write_text(str(exception))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        state = {"state": module.state_dict(), "skipped": module.guard.skipped}
        torch.save(state, self.home / f"end{trainer.global_rank}.pt")


@pytest.fixture
def run(model_dir: Callable[..., Path], tmp_path: Path) -> Callable[[str], None]:
    home = tmp_path / "data"
    home.mkdir()
    prompts = [f"\n\nHuman: {i}?\n\nAssistant:" for i in range(ROWS)]
    rows = [{"chosen": f"{prompt} yes", "rejected": f"{prompt} no"} for prompt in prompts]
    (home / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def fit(policy: str) -> None:
        base = str(model_dir("gpt2"))
        torch.manual_seed(0)
        module = NaNOnRankOne(
            base, optimizer=sgd, schedule="constant_with_warmup", on_nonfinite=policy
        )
        data = HHSFTDataModule(
            base, str(home), examples_per_batch=6, cache_dir=str(tmp_path / "cache")
        )
        trainer(
            tmp_path,
            devices=2,
            strategy="ddp_spawn",
            max_steps=3,
            limit_val_batches=0,
            callbacks=[Witness(tmp_path)],
        ).fit(module, datamodule=data)

    return fit


def test_both_ranks_stop_with_the_rows_of_the_one(
    run: Callable[[str], None], tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="global step 1: the loss is nan"):
        run("stop")
    # The first rank to end may take the other along; the parent tells its error once more.
    errors = [file.read_text() for file in tmp_path.glob("error*")]
    kept = tmp_path / "nonfinite-step1-rank1.pt"
    rows = torch.load(kept, weights_only=True)["rows"]
    told = f"global step 1: the loss is nan; {', '.join(rows)}; the batch is kept in {kept}; no "
    assert errors
    assert all(told in error for error in errors)
    assert not (tmp_path / "nonfinite-step1-rank0.pt").exists()
    assert not list(tmp_path.glob("end*"))


def test_both_ranks_skip(run: Callable[[str], None], tmp_path: Path) -> None:
    run("skip")
    first, second = (torch.load(tmp_path / f"end{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    for name, value in first["state"].items():
        assert value.isfinite().all()
        assert torch.equal(value, second["state"][name])
