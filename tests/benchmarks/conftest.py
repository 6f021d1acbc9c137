"""Runs the benchmark scripts in this process, their arms as threads: imports are paid for once."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts find what they share beside them, as when python runs one."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


class ThreadedProcess:
    """Stands in for the worker's process: the same protocol over the same kind of pipe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        requests, self._to_worker = os.pipe()
        self._from_worker, replies = os.pipe()
        self.stdin = os.fdopen(self._to_worker, "w")
        self.stdout = os.fdopen(self._from_worker)
        self._ends = os.fdopen(requests), os.fdopen(replies, "w")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        from sidebyside.worker import serve

        requests, replies = self._ends
        with requests, replies:
            serve(requests, replies)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        self.stdout.close()
        return 1


@pytest.fixture
def run_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``run_script(name, *flags)``: the exit code and what ``--json`` wrote."""

    def run(name: str, *flags: str) -> tuple[int, dict[str, Any]]:
        import sidebyside.flops
        import sidebyside.runner

        # A ceiling of any size will do; the real one takes minutes without bf16 instructions.
        monkeypatch.setattr(sidebyside.flops, "_CEILING_SIZE", {"cpu": 256})
        monkeypatch.setattr(sidebyside.runner.subprocess, "Popen", ThreadedProcess)
        numbers = tmp_path / "numbers.json"
        monkeypatch.setattr(sys, "argv", [name, *flags, "--json", str(numbers)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        found = json.loads(numbers.read_text()) if numbers.exists() else {}
        return int(ended.value.code or 0), found

    return run


@pytest.fixture
def run_on_pairs(
    monkeypatch: pytest.MonkeyPatch, model_dir: Callable[[str], Path], tmp_path: Path
) -> Callable[..., int]:
    """``run_on_pairs(name, *arguments)``: a script's exit code on forty training and eight test
    pairs of ``tmp_path``, steps of eight.
    """
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n}, of course.", "rejected": f"No {n % 3}."}
        for n in range(48)
    ]
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))

    def run(name: str, *arguments: str) -> int:
        fixed = ["--model", str(model_dir("llama")), "--data", str(tmp_path), "--per-step", "8"]
        monkeypatch.setattr(sys, "argv", [name, *arguments[:1], *fixed, *arguments[1:]])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return int(ended.value.code or 0)

    return run
