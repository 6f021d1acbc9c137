"""The day on a GPU, every part of it with tiny sizes on a CPU."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS, ThreadedProcess

# The peers' libraries warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
Day = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Day:
    """``gpu_day(*flags)``: the exit code and every figure written so far."""

    def run(*flags: str) -> tuple[int, list[dict[str, Any]]]:
        import sidebyside.runner

        monkeypatch.setattr(sidebyside.runner.subprocess, "Popen", ThreadedProcess)
        command = ["gpu_day.py", "--out", str(tmp_path), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / "gpu_day.py"), run_name="__main__")
        file = tmp_path / "figures.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return int(ended.value.code or 0), [json.loads(line) for line in lines]

    return run


def named(figures: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """A part's figures by name."""
    return {line["name"]: line["value"] for line in figures if line["part"] == part}


@pytest.mark.slow
def test_steps_beside_the_peers(gpu_day: Day) -> None:
    code, figures = gpu_day("--tiny", "--parts", "steps")
    found = named(figures, "steps")
    assert code == 0, found
    for name in (f"tiny-gpt2-shape {task}" for task in ("dpo", "sft", "lm")):
        assert found[f"{name}: whole"] and isinstance(found[f"{name}: parity"], bool)
        assert found[f"{name}: alignkit: peak above the model"] > 0
        assert found[f"{name}: alignkit: MFU of useful tokens"] > 0
    assert found["tiny-gpt2-shape dpo: speed_vs_trl"] > 0
    assert found["tiny-gpt2-shape sft: speed_vs_trl"] > 0
    assert found["tiny-gpt2-shape lm: step_vs_peft"] > 0
    assert set(figures[0]) == {
        "part", "name", "value", "unit", "settings", "device", "tiny", "versions", "at",
    }  # fmt: skip


@pytest.mark.slow
def test_every_other_part_then_none_again(gpu_day: Day) -> None:
    parts = "ceiling,rows,attention,compile,nf4,sync,train"
    code, figures = gpu_day("--tiny", "--parts", parts)
    assert code == 0, [line for line in figures if line["name"] == "error"]
    assert all("whole" in named(figures, part) for part in parts.split(","))
    assert named(figures, "ceiling")["bf16 matmul"] > 0
    assert named(figures, "rows")["tiny-llama-shape: rows of 512: tokens"] > 0
    assert named(figures, "attention")["dense, 2x16: time"] > 0
    assert "tiny-llama-shape: compiled: time per step" in named(figures, "compile")
    assert named(figures, "sync")["tiny-llama-shape: waits"] == 0
    assert named(figures, "train")["tiny-llama-shape: Trainer over bare step"] > 0
    assert {line["device"] for line in figures} == {"cpu"}
    assert gpu_day("--tiny", "--parts", parts) == (0, figures)


def test_a_part_that_fails_leaves_a_line_and_the_next_runs(
    gpu_day: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuday import attention

    def fail(day: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "measure", fail)
    code, figures = gpu_day("--tiny", "--parts", "attention,ceiling")
    assert code == 1
    assert named(figures, "attention") == {"error": "RuntimeError: no kernel image"}
    assert "whole" in named(figures, "ceiling")


def test_a_contest_that_fails_leaves_the_others_and_alignkit_alone(
    gpu_day: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuday import steps

    from alignkit.errors import AlignkitError

    def fail(*_: object) -> None:
        raise AlignkitError("trl: failed; out of memory")

    monkeypatch.setattr(steps, "compare", fail)
    code, figures = gpu_day("--tiny", "--parts", "steps")
    found = named(figures, "steps")
    assert code == 1 and "tiny-gpt2-shape dpo" in found["error"]
    for name in ("tiny-gpt2-shape dpo", "tiny-gpt2-shape lm"):
        assert found[f"{name}: error"] == "AlignkitError: trl: failed; out of memory"
        assert found[f"{name}: step alone"] > 0 and f"{name}: whole" not in found


def test_without_trl_dpo_goes_alone_and_sft_beside_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuday import steps

    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert steps.contest_of("dpo") is None
    contest = steps.contest_of("sft")
    assert contest is not None and [arm.package for arm in contest.peers] == ["peft", "peft"]
    assert contest.task == "sft" and contest.truth == "peft"


def test_a_cut_line_is_left_out_and_other_devices_do_not_count(tmp_path: Path) -> None:
    from gpuday.record import Figures

    path = tmp_path / "figures.jsonl"
    about = {"device": "cpu", "tiny": True, "versions": {}}
    Figures(path, about).add("sync", "whole", 1.0, "s")
    with path.open("a") as file:
        file.write('{"part": "train", "na')
    again = Figures(path, about)
    assert again.is_whole("sync") and not again.is_whole("train")
    again.add("train", "whole", 2.0, "s")
    assert Figures(path, about).is_whole("train")
    for other in ({"device": "H100"}, {"tiny": False}):
        assert not Figures(path, about | other).is_whole("sync")
    rows = about | {"versions": {"lengths": "one"}}
    Figures(path, rows).add("nf4", "whole", 1.0, "s")
    assert Figures(path, rows).is_whole("nf4")
    assert not Figures(path, about | {"versions": {"lengths": "another"}}).is_whole("nf4")
    assert not Figures(path, about, again=True).is_whole("sync")


def test_mistakes_are_one_line(gpu_day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, part in (
        (["--parts", "stepz"], "stepz"),
        ([], "--tiny"),
        (["--tiny", "--parts", " , "], "--parts"),
        (["--tiny", "--limit", "nan"], "--limit"),
        (["--tiny", "--out", __file__], "test_gpu_day.py"),
    ):
        code, figures = gpu_day(*flags)
        message = capsys.readouterr().err.strip()
        assert code == 2 and not figures
        assert message.startswith("error: ") and part in message and "\n" not in message
