"""What two processes wrote in parts, read by every command as any other checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_fit import quick
from tests.cli.test_launch import SCRIPT


@pytest.mark.slow
def test_every_command_reads_a_checkpoint_in_parts(
    alignkit: Callable, command: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    """The same numbers and answers as from the one file that ``export`` makes of it."""
    whole = ["--model.lora", "null", "--model.dtype", "float32", "--trainer.precision", "32-true"]
    done = command(SCRIPT, "--trainer.devices", 2, "--trainer.strategy", "fsdp2", *whole)
    assert done.returncode == 0, done.stderr
    (parts,) = Path("runs").rglob("last.ckpt")
    assert parts.with_name("last.ckpt.shards").is_dir()

    status, out, err = alignkit("export", "--model", parts, "--to", "checkpoint", "--output", "one")
    assert status == 0, err
    assert "wrote one/last.ckpt" in out and [p.name for p in Path("one").iterdir()] == ["last.ckpt"]

    answers, losses = [], []
    for place in (parts, Path("one/last.ckpt")):
        status, _, err = alignkit(
            "generate", "--model", place, "--prompts", "Why?", "--temperature", 0,
            "--max_new_tokens", 8, "--json", "answers.json",
        )  # fmt: skip
        assert status == 0, err
        answers.append(json.loads(Path("answers.json").read_text())["answers"])
        fit = quick("demo/sft.yaml", model_dir, hh, text, 1)
        status, out, err = alignkit("validate", *fit[1:], *whole, "--ckpt_path", place)
        assert status == 0, err
        losses += re.findall(r"val/loss\D*([\d.]+)", out)
        status, _, err = alignkit(*fit, *whole, "--ckpt_path", place, "--trainer.max_steps", 2)
        assert status == 0, err
    assert answers[0] == answers[1] and answers[0]
    assert len(losses) == 2 and losses[0] == losses[1]

    status, _, err = alignkit("export", "--model", parts, "--to", "merged", "--output", "merged")
    assert status == 0, err
    assert Path("merged/model.safetensors").is_file()
