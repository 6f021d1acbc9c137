"""Where runs keep their checkpoints, and what ``--ckpt_path`` makes of names and bad files."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from alignkit.models.checkpoint import read_checkpoint
from tests.cli.test_fit import quick

RUNS = Path("runs/demo/sft")


@pytest.fixture
def sft(
    alignkit: Callable,
    model_dir: Callable,
    hh: Path,
    text: Path,
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., str]:
    """Run SFT for two steps, or what the changes say; return standard error and the log."""

    def run(*changes: object, command: str = "fit", expected: int = 0) -> str:
        caplog.clear()
        arguments = quick("demo/sft.yaml", model_dir, hh, text, 2)
        status, _, err = alignkit(command, *arguments[1:], *changes)
        assert status == expected, err
        assert "Traceback" not in err
        return "\n".join([err, *caplog.messages])

    return run


def refusal(err: str) -> str:
    (line,) = [line for line in err.splitlines() if "error:" in line]
    return line


def cut(path: Path) -> None:
    """Leave half of a file, as a full disk does."""
    times = path.stat().st_mtime
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, (times, times))


def test_runs_keep_their_checkpoints_apart(sft: Callable) -> None:
    """Two runs of one configuration, and a third that starts from the second."""
    sft()
    first = (RUNS / "version_0/last.ckpt").read_bytes()
    sft("--model.optimizer.lr", 0.05)
    assert (RUNS / "version_0/last.ckpt").read_bytes() == first
    err = sft("--model.init_from", RUNS, "--trainer.max_steps", 1, "--model.optimizer.lr", 0)
    assert f"{RUNS}: taking {RUNS}/version_1/last.ckpt" in err
    names = ["config.yaml", "best.ckpt", "last.ckpt"]
    for number in range(3):
        assert all((RUNS / f"version_{number}" / name).is_file() for name in names)
    second, third = (read_checkpoint(RUNS / f"version_{n}")["state_dict"] for n in (1, 2))
    assert all(torch.equal(second[name], third[name]) for name in second)
    config = yaml.safe_load((RUNS / "version_2/config.yaml").read_text())
    named = f"{RUNS}/version_1/last.ckpt"
    assert config["model"]["init_args"]["init_from"] == named
    assert read_checkpoint(RUNS)["hyper_parameters"]["init_from"] == named


@pytest.mark.parametrize(
    ("logger", "places"),
    [
        (["false"], ["checkpoints/version_0", "checkpoints/version_1"]),
        (["CSVLogger", "--trainer.logger.save_dir", "csv"], ["csv/*/version_0", "csv/*/version_1"]),
    ],
)
def test_other_loggers_and_none(sft: Callable, logger: list[str], places: list[str]) -> None:
    for _ in places:
        sft("--trainer.logger", *logger)
        Path("config.yaml").unlink(missing_ok=True)
    for place in places:
        (file,) = Path().glob(f"{place}/last.ckpt")
        assert read_checkpoint(file)["global_step"] == 2
    assert "taking" in sft("--trainer.logger", *logger, "--ckpt_path", "last")


def test_last_is_found_in_earlier_runs_and_refused_where_there_is_none(sft: Callable) -> None:
    line = refusal(sft("--ckpt_path", "last", expected=2))
    assert f"ckpt_path last: there is no checkpoint in {RUNS}" in line
    assert not list(RUNS.rglob("*.ckpt"))
    sft()
    assert f"taking {RUNS}/version_0/last.ckpt" in sft("--ckpt_path", "last")
    assert f"taking {RUNS}/version_" in sft("--ckpt_path", "last", command="validate")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_damaged_last_is_passed_over_by_name_and_refused_by_path(
    sft: Callable, command: str
) -> None:
    sft()
    cut(RUNS / "version_0/last.ckpt")
    line = refusal(sft("--ckpt_path", RUNS / "version_0/last.ckpt", command=command, expected=2))
    assert f"{RUNS}/version_0/last.ckpt: not a readable checkpoint" in line
    assert f"{RUNS}/version_0/best.ckpt is intact" in line
    err = sft("--ckpt_path", "last", command=command)
    (line,) = [line for line in err.splitlines() if "taking" in line]
    assert f"ckpt_path last: taking {RUNS}/version_0/best.ckpt, for " in line
    for path in RUNS.rglob("*.ckpt"):
        cut(path)
    line = refusal(sft("--ckpt_path", "last", command=command, expected=2))
    assert "ckpt_path last: holds no intact checkpoint: " in line


def test_best_is_the_newest_runs_best(sft: Callable) -> None:
    assert "ckpt_path best: there is no checkpoint" in sft("--ckpt_path", "best", expected=2)
    sft("--model.optimizer.lr", 1.0)  # the longer, the worse
    assert read_checkpoint(RUNS / "version_0/best.ckpt")["global_step"] == 1
    err = sft("--ckpt_path", "best", command="test")
    assert f"from the checkpoint at {RUNS}/version_0/best.ckpt" in err
    assert f"taking {RUNS}/version_0/best.ckpt" in err.replace(f"{Path.cwd()}/", "")
    assert "taking" not in err.replace("best: taking", "", 1)
    assert "measures" not in err
    assert "validate: measures the base, without any training" in sft(command="validate")
    (RUNS / "version_0").rename(RUNS / "version_7")
    err = sft("--ckpt_path", "best", command="test")
    assert f"from the checkpoint at {RUNS}/version_7/best.ckpt" in err
    cut(RUNS / "version_7/best.ckpt")
    err = sft("--ckpt_path", "best", command="test")
    assert f"taking the newest instead, {RUNS}/version_7/last.ckpt" in err


def test_hpc_is_the_newest_intact_one(sft: Callable) -> None:
    assert "ckpt_path hpc: there is no checkpoint" in sft("--ckpt_path", "hpc", expected=2)
    sft()
    for number in (2, 10):
        Path(f"hpc_ckpt_{number}.ckpt").write_bytes((RUNS / "version_0/last.ckpt").read_bytes())
    assert "taking hpc_ckpt_10.ckpt" in sft("--ckpt_path", "hpc").replace(f"{Path.cwd()}/", "")
    cut(Path("hpc_ckpt_10.ckpt"))
    assert "taking hpc_ckpt_2.ckpt, for" in sft("--ckpt_path", "hpc").replace(f"{Path.cwd()}/", "")


def test_a_resumed_run_remembers_the_best_of_the_run_before(sft: Callable) -> None:
    """It is not written again by a worse one, and the file before is left alone."""
    ascent = ["--model.optimizer", "SGD", "--model.optimizer.maximize", "true"]
    rates = [*ascent, "--model.optimizer.lr", 1.0, "--model.schedule", "constant_with_warmup"]
    sft(*rates)
    before = (RUNS / "version_0/best.ckpt").read_bytes()
    sft(*rates, "--ckpt_path", "last", "--trainer.max_steps", 3)
    states = read_checkpoint(RUNS / "version_1")["callbacks"].values()
    (state,) = (state for state in states if "best_model_path" in state)
    assert state["best_model_path"] == f"{RUNS}/version_0/best.ckpt"
    assert not (RUNS / "version_1/best.ckpt").exists()
    assert (RUNS / "version_0/best.ckpt").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(sft: Callable) -> None:
    Path("file").touch()
    place = ["--trainer.callbacks.init_args.dirpath", "file/below"]
    line = refusal(sft(*place, expected=2))
    assert "file/below: cannot be written (Not a directory)" in line


def test_resuming_from_a_url(sft: Callable) -> None:
    place = "memory://alignkit/run"
    sft("--trainer.callbacks.init_args.dirpath", place)
    err = sft("--ckpt_path", f"{place}/last.ckpt", "--trainer.max_steps", 3)
    assert f"Restored all states from the checkpoint at {place}/last.ckpt" in err
    assert read_checkpoint(RUNS)["global_step"] == 3


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(sft: Callable) -> None:
    """A limit on the size of files stands for the disk; the checkpoints alone reach it."""
    sft()
    size = (RUNS / "version_0/last.ckpt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        line = refusal(sft("--ckpt_path", "last", "--trainer.max_steps", 3, expected=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(
        f"{RUNS}/version_1/.*ckpt: cannot be written .File too large.; make room", line
    )
    assert read_checkpoint(RUNS / "version_0")["global_step"] == 2
    assert not list(RUNS.rglob("*.partial"))
