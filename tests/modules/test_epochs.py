"""Epochs are counted through every resume: no epoch is trained twice or left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from alignkit.callbacks import Checkpoint
from alignkit.modules import SFTModule
from tests.modules.helpers import answers, loader, trainer


@pytest.mark.parametrize("validates", [False, True])
def test_a_resumed_run_is_resumed(
    model_dir: Callable[[str], Path], tmp_path: Path, validates: bool
) -> None:
    """One epoch, one more, none, and two more, each from the checkpoint of the run before."""

    base = str(model_dir("llama"))

    def run(name: str, epochs: int, start: Path | None = None) -> tuple[Path, list[int]]:
        trained: list[int] = []

        class Count(Callback):
            def on_train_batch_end(self, run: object, *_: object) -> None:
                trained.append(run.current_epoch)  # type: ignore[attr-defined]

        torch.manual_seed(0)
        module = SFTModule(base, schedule="constant_with_warmup")
        saver = Checkpoint(tmp_path / name, save_last=True, save_top_k=0)
        fitted = trainer(
            tmp_path, max_epochs=epochs, callbacks=[saver, Count()], enable_checkpointing=True,
            num_sanity_val_steps=0,
        )  # fmt: skip
        val = loader(answers(4, seed=1), 2) if validates else None
        fitted.fit(module, loader(answers(6), 2), val, ckpt_path=start)
        return tmp_path / name / "last.ckpt", trained

    first, trained = run("first", 1)
    assert trained == [0, 0, 0]
    second, trained = run("second", 2, first)
    assert trained == [1, 1, 1]
    idle, trained = run("idle", 2, second)
    assert trained == []
    whole = torch.load(run("whole", 4)[0], weights_only=True)
    for start in (second, idle):
        last, trained = run(f"after-{start.parent.name}", 4, start)
        assert trained == [2] * 3 + [3] * 3
        found = torch.load(last, weights_only=True)
        assert found["global_step"] == whole["global_step"] == 12
        for name, value in whole["state_dict"].items():
            assert torch.equal(found["state_dict"][name], value), (start, name)
