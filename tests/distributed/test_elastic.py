"""A run of gloo ranks resumes mid-epoch on another number of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from alignkit import HHSFTDataModule
from alignkit.modules import SFTModule
from tests.modules.helpers import sgd, trainer

# Each run writes into a folder of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.slow,
]
ROWS, SAVED = 45, 2


class Witness(L.Callback):
    """Writes the rows of every step, and what a run ends with."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seen: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rows = trainer.datamodule.rows_of_batch(batch_idx)
        self.seen += [(trainer.current_epoch, trainer.global_step, line) for _, line in rows]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (self.home / f"seen{trainer.global_rank}.json").write_text(json.dumps(self.seen))
        end = {"state": module.state_dict(), "steps": trainer.global_step}
        end["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        torch.save(end, self.home / f"end{trainer.global_rank}.pt")


@pytest.fixture
def run(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], Counter[tuple[int, int, int]]]]:
    draw = random.Random(0)
    data = tmp_path / "data"
    data.mkdir()
    words = [
        " ".join(draw.choices(["yes", "no", "tea"], k=draw.randint(1, 9))) for _ in range(ROWS)
    ]
    prompts = [f"\n\nHuman: {i}?\n\nAssistant:" for i in range(ROWS)]
    rows = [
        {"chosen": f"{p} {w}", "rejected": f"{p} no"} for p, w in zip(prompts, words, strict=True)
    ]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def fit(
        ranks: int, options: dict[str, Any], resume: Path | None = None
    ) -> tuple[dict[str, Any], Counter[tuple[int, int, int]]]:
        monkeypatch.delenv("MASTER_PORT", raising=False)  # each run draws a port of its own
        home = tmp_path / f"{ranks}-{resume is not None}"
        home.mkdir()
        base = str(model_dir("gpt2"))
        torch.manual_seed(0)
        module = SFTModule(base, optimizer=sgd, schedule="linear")
        examples = HHSFTDataModule(
            base, str(data), cache_dir=str(tmp_path / "cache"), val_fraction=0.05, **options
        )
        saver = ModelCheckpoint(home, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(
            home,
            devices=ranks,
            strategy="ddp_spawn" if ranks > 1 else "auto",
            max_epochs=2,
            limit_val_batches=0,
            callbacks=[saver, Witness(home)],
            enable_checkpointing=True,
        ).fit(module, datamodule=examples, ckpt_path=resume, weights_only=True)
        seen = [json.loads((home / f"seen{rank}.json").read_text()) for rank in range(ranks)]
        end = torch.load(home / "end0.pt", weights_only=True)
        return end, Counter(tuple(each) for rank in seen for each in rank)

    return fit


@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 3), (1, 2)])
def test_a_fixed_number_of_examples_trains_the_same_model(
    run: Callable[..., Any], before: int, after: int, tmp_path: Path
) -> None:
    """Two epochs of 12 examples a step, on all ranks or with others from the second step on."""
    options = {"examples_per_batch": 12}
    whole, seen = run(before, options)
    resumed, rest = run(after, options, resume=tmp_path / f"{before}-False" / f"step={SAVED}.ckpt")
    assert rest == Counter({each: n for each, n in seen.items() if each[1] >= SAVED})
    assert resumed["steps"] == whole["steps"] == 8
    for name, value in whole["state"].items():
        torch.testing.assert_close(resumed["state"][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_token_budget_shows_the_rest_once_and_its_schedule_ends_with_it(
    run: Callable[..., Any], before: int, after: int, tmp_path: Path
) -> None:
    """On one rank an epoch has about twice the steps that it has on two."""
    options = {"tokens_per_batch": 60}
    whole, seen = run(before, options)
    resumed, rest = run(after, options, resume=tmp_path / f"{before}-False" / f"step={SAVED}.ckpt")
    first = {line for epoch, step, line in seen if step < SAVED}
    others = [line for epoch, _, line in rest if epoch == 0]
    assert len(others) == len(set(others))
    assert not first & set(others)
    epochs = first | set(others), {line for epoch, _, line in rest if epoch == 1}
    for shown in epochs:  # each may leave out one example fewer than it has ranks
        assert len(set.union(*epochs) - shown) < after
    left = (resumed["steps"] - SAVED) / (whole["steps"] - SAVED)
    assert left == pytest.approx(before / after, rel=0.3)
    assert resumed["lr"] == 0.0
    assert max(step for _, step, _ in rest) == resumed["steps"] - 1
