"""docs/watching.md: other loggers get losses, metrics and settings by configuration alone.

MLflow, trackio and Weights & Biases are tried where they are installed, without a network.
"""

from __future__ import annotations

import csv
import json
import re
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger

from alignkit.errors import AlignkitError
from alignkit.tools.trackio_logger import TrackioLogger

PAGE = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
STEPS = 4


def config_of(logger: str) -> str:
    """Return the page's configuration of a logger."""
    (found,) = (text for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
                if re.search(rf"\.{logger}\b", text))  # fmt: skip
    return found


@pytest.fixture
def train(alignkit: Callable, model_dir: Callable, hh: Path) -> Callable[[str], Path]:
    """``train(config)``: four DPO steps under a logger; the folder that the command names."""

    def run(config: str) -> Path:
        Path("watch.yaml").write_text(config)
        status, out, err = alignkit(
            "dpo", "--base", model_dir("llama"), "--data", hh, "--config", "watch.yaml",
            "--steps", STEPS, "--trainer.val_check_interval", 2, "--trainer.accelerator", "cpu",
            "--trainer.check_val_every_n_epoch", "null", "--trainer.enable_progress_bar", "false",
            "--data.num_workers", 0, "--data.tokens_per_batch", 512,
            "--trainer.callbacks+=alignkit.SampleAnswers",
            "--trainer.callbacks.prompts", '["Name three rivers."]',
            "--trainer.callbacks.max_new_tokens", 2,
        )  # fmt: skip
        assert status == 0, err
        (folder,) = re.findall(r"^wrote (\S+): last.ckpt, best.ckpt, config.yaml$", out, re.M)
        assert f"next: alignkit chat {folder}\n" in out
        found = sorted(path.parent for path in Path().rglob("config.yaml"))
        assert found == [Path(folder)], "and nowhere else"
        assert Path(folder, "last.ckpt").is_file()
        return Path(folder)

    return run


def check(curves: Mapping[str, Mapping[int, float]], settings: Mapping[str, Any]) -> None:
    """Hold what a logger stored against what the run did."""
    assert [*curves["train/loss"]] == [*range(STEPS)]
    assert curves["train/loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert [*curves["val/loss"]] == [1, 3]
    assert {"train/grad_norm", "val/rewards/accuracies", "samples/repetition"} <= curves.keys()
    assert float(settings["lr"]) == pytest.approx(5e-5)
    assert int(float(settings["lora/r"])) == 8
    assert settings["data"] == "PreferenceDataModule"


class Numbered(Logger):
    """A logger that numbers runs and has no folder, as MLflow's over a database."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, dict[int, float]] = {}
        self.settings: dict[str, Any] = {}
        seen.append(self)

    @property
    def name(self) -> str:
        return "mine"

    @property
    def version(self) -> str:
        return "a1b2"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.curves.setdefault(key, {})[-1 if step is None else step] = value

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.settings |= flat(dict(params))


seen: list[Numbered] = []


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested values by names joined with slashes."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}/")
        else:
            found[f"{above}{name}"] = value
    return found


def test_a_logger_of_ones_own(train: Callable[[str], Path]) -> None:
    """Its runs have folders of their own, with their configurations."""
    folder = train(f"trainer: {{logger: {{class_path: {__name__}.Numbered}}}}")
    assert folder == Path("runs/dpo/mine/a1b2")
    check(seen[-1].curves, seen[-1].settings)


def test_csv(train: Callable[[str], Path]) -> None:
    folder = train(config_of("CSVLogger"))
    assert folder == Path("runs/dpo/version_0")
    curves: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    check(curves, flat(yaml.safe_load((folder / "hparams.yaml").read_text())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's and its dependencies' own
def test_mlflow(train: Callable[[str], Path]) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder = train(config_of("MLFlowLogger"))
    with sqlite3.connect("mlflow.db") as base:
        assert base.execute("select name from experiments").fetchall()[-1] == ("alignkit",)
        ((run, status),) = base.execute("select run_uuid, status from runs").fetchall()
        settings = dict(base.execute("select key, value from params").fetchall())
        points = base.execute("select key, step, value from metrics").fetchall()
    assert folder.name == run and folder.parts[0] == "runs" and status == "FINISHED"
    curves: dict[str, dict[int, float]] = {}
    for key, step, value in points:
        curves.setdefault(key, {})[step] = value
    check(curves, settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb(train: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train(config_of("WandbLogger"))
    wandb.finish()
    assert folder.parent == Path("runs/alignkit")
    (stored,) = Path("runs").rglob(f"run-{folder.name}.wandb")
    curves: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}
    written: list[Record] = []
    while not any(record.HasField("exit") for record in written):  # another process writes it
        time.sleep(0.2)
        written = [Record.FromString(data) for data in records(stored.read_bytes())]
    for record in written:
        for update in record.config.update:
            name = update.key or "/".join(update.nested_key)
            settings |= flat({name: json.loads(update.value_json)})
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            if isinstance(value, int | float) and "trainer/global_step" in row:
                curves.setdefault(name, {})[row["trainer/global_step"]] = value
    check(curves, settings)
    answers = [json.loads(path.read_text()) for path in Path("runs").rglob("*.table.json")]
    assert answers and answers[0]["columns"] == ["prompt", "answer"]
    assert answers[0]["data"][0][0] == "Name three rivers."


def test_a_logger_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(AlignkitError, match="pip install trackio"):
        TrackioLogger()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_trackio(
    train: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    folder = train(config_of("TrackioLogger"))
    assert folder.parent == Path("runs/alignkit")
    assert SQLiteStorage.get_runs("alignkit") == [folder.name]
    curves: dict[str, dict[int, float]] = {}
    for row in SQLiteStorage.get_logs("alignkit", folder.name):
        for name, value in row.items():
            if isinstance(value, int | float):
                curves.setdefault(name, {})[row["step"]] = value
    check(curves, flat(SQLiteStorage.get_run_config("alignkit", folder.name)))

    logger = TrackioLogger(run="two-stages")
    for step in range(2):  # fit, then test, by one trainer
        logger.log_metrics({"loss": 0.5}, step)
        logger.finalize("success")
    assert [row["step"] for row in SQLiteStorage.get_logs("alignkit", "two-stages")] == [0, 1]


def records(stored: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B: LevelDB's log format after a header of seven bytes."""
    at, size, held = 7, 32_768, b""
    while at + 7 <= len(stored):
        if size - at % size < 7:
            at += size - at % size
            continue
        _, length, kind = struct.unpack("<IHB", stored[at : at + 7])
        held += stored[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""
