"""alignkit's own code asks nothing of POSIX: the commands run under Windows' rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_fit import quick

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="tells by /proc which files are held open"
)


def test_the_commands_ask_nothing_of_posix(
    workplace: Path, hh: Path, text: Path, model_dir: Callable[..., Path]
) -> None:
    fit = [str(each) for each in quick("demo/sft.yaml", model_dir, hh, text, 2)]
    adapter = ["export", "--model", "runs/demo/sft", "--output", "adapter"]
    whole = ["export", "--model", "adapter", "--output", "whole", "--to", "merged"]
    commands = [
        ["audit", str(hh / "train.jsonl")],
        fit,
        [*fit, "--trainer.max_steps", "4", "--ckpt_path", "last"],
        adapter,
        whole,
        ["generate", "--model", "adapter", "--prompts", "Hello", "--max_new_tokens", "2"],
    ]
    script = Path(__file__).with_name("as_on_windows.py")
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", str(script), json.dumps(commands)],
        capture_output=True,
        encoding="cp1252",
        env={
            **os.environ,
            "ALIGNKIT_CACHE": str(workplace / "cache"),
            "PYTHONIOENCODING": "cp1252:strict",  # what a pipe has there
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workplace / "whole" / "model.safetensors").exists()
