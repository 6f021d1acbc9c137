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


def test_steps_beside_the_peers(gpu_day: Day) -> None:
    code, figures = gpu_day("--tiny", "--parts", "steps")
    found = named(figures, "steps")
    assert code == 0, found
    for name in ("tiny-gpt2-shape dpo", "tiny-gpt2-shape lm"):
        assert found[f"{name}: whole"] and isinstance(found[f"{name}: parity"], bool)
        assert found[f"{name}: alignkit: peak above the model"] > 0
        assert found[f"{name}: alignkit: MFU of useful tokens"] > 0
    assert found["tiny-gpt2-shape dpo: speed_vs_trl"] > 0
    assert found["tiny-gpt2-shape lm: step_vs_peft"] > 0
    assert set(figures[0]) == {
        "part", "name", "value", "unit", "settings", "device", "tiny", "versions", "at",
    }  # fmt: skip
