"""Whatever settings are made of, the checkpoints that hold them are read again."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import AdamW

from alignkit.models.checkpoint import read_checkpoint
from alignkit.modules import DPOModule, SFTModule
from alignkit.objectives.preference import DPO, WeightedSum
from alignkit.utils.plain import plain
from tests.modules.helpers import answers, loader, pairs, trainer


class Shape(StrEnum):
    """A text that is pickled as more than a text."""

    LINEAR = "linear"


def adamw(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=np.float64(1e-3), betas=(np.float64(0.8), 0.9))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}),
        ({}, {"gradient_clip_val": np.float64(1), "gradient_clip_algorithm": "value"}),
        ({"warmup_steps": np.float64(0.1), "schedule": Shape.LINEAR}, {}),
        ({"base": Path, "tokenizer": Path, "dropout": np.bool_(True)}, {}),
        ({"optimizer": adamw}, {"max_steps": np.int64(2)}),
        ({"loss": WeightedSum((DPO(np.float32(0.5)),), (np.float64(2),))}, {}),
    ],
    ids=["norm", "value", "schedule", "paths", "optimizer", "loss"],
)
def test_every_checkpoint_is_read_and_resumed(
    settings: dict[str, Any], options: dict[str, Any], model_dir: Callable, tmp_path: Path
) -> None:
    """Also what other libraries make: members of enums, numbers of NumPy, paths."""
    base = str(model_dir("gpt2"))
    settings = {name: Path(base) if value is Path else value for name, value in settings.items()}
    kind, rows = (DPOModule, pairs(4)) if "loss" in settings else (SFTModule, answers(4))

    def fit(steps: int, **more: Any) -> None:
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        given = {"max_steps": steps, **options, "callbacks": [saver], "enable_checkpointing": True}
        run = trainer(tmp_path, **given)
        run.fit(kind(**{"base": base, **settings}), loader(rows, 1), **more)

    fit(2)
    last = tmp_path / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 2
    options.pop("max_steps", None)
    fit(3, ckpt_path=last)
    assert kind.load_from_checkpoint(last) is not None


def test_a_callbacks_state_is_read_again(model_dir: Callable, tmp_path: Path) -> None:
    class Keeps(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"best": np.float64(0.5), Shape.LINEAR: [Path("a"), np.int64(2)], "seen": {1}}

    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run = trainer(tmp_path, max_steps=1, callbacks=[saver, Keeps()], enable_checkpointing=True)
    run.fit(SFTModule(str(model_dir("gpt2"))), loader(answers(2), 1))
    states = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]
    assert {"best": 0.5, "linear": ["a", 2], "seen": {1}} in states.values()


class Mine(SFTModule):
    """Takes an object, which the command line makes of a class path."""

    def __init__(self, *args: Any, judge: object = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge = judge


def test_an_object_is_left_out_and_given_again(
    model_dir: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning before the first step: the file is read, and resumes."""
    judge = object()
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    for steps in (1, 2):
        given = {"max_steps": steps, "callbacks": [saver], "enable_checkpointing": True}
        module = Mine(str(model_dir("gpt2")), judge=judge)
        last = tmp_path / "last.ckpt" if steps == 2 else None
        trainer(tmp_path, **given).fit(module, loader(answers(2), 1), ckpt_path=last)
    assert "model.judge: is a object, which checkpoints do not keep" in caplog.text
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
    assert Mine.load_from_checkpoint(tmp_path / "last.ckpt", judge=judge).judge is judge


def test_values_of_subclasses_become_those_of_their_class() -> None:
    found = plain({Shape.LINEAR: [np.int64(3), np.float64(0.5)], "flag": np.bool_(True)})
    assert found == {"linear": [3, 0.5], "flag": True}
    assert [type(each) for each in found["linear"]] == [int, float]
    assert type(next(iter(found))) is str
    assert found["flag"] is True
    assert plain({"seen": {np.int64(1)}, "none": None}) == {"seen": {1}, "none": None}
