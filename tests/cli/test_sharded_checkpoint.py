"""What two processes wrote in parts, read by every command as any other checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import SFTModule
from alignkit.errors import AlignkitError
from tests.cli.test_fit import quick
from tests.cli.test_launch import SCRIPT

SMALL = '''
import resource, signal
from lightning.pytorch import Callback


class Small(Callback):
    """Leave each process no more room than for 60 kB a file."""

    def on_train_start(self, trainer, pl_module):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
'''


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

    # Copied without its folder it is no checkpoint, and does not pass for an intact one.
    best = parts.with_name("best.ckpt")
    assert best.with_name("best.ckpt.shards").is_dir()
    shutil.rmtree(parts.with_name("last.ckpt.shards"))
    ask = ("--prompts", "Why?", "--max_new_tokens", 2)
    status, _, err = alignkit("generate", "--model", parts.parent, *ask)
    assert status == 0, err
    shutil.rmtree(best.with_name("best.ckpt.shards"))
    status, _, err = alignkit("generate", "--model", parts.parent, *ask)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "keep the folder beside the checkpoint" in line
    assert "is intact" not in err
    with pytest.raises(AlignkitError, match="keep the folder beside the checkpoint"):
        SFTModule.load_from_checkpoint(parts)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_parts(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch raises what is no `Exception`."""
    Path("small.py").write_text(SMALL)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()), prepend=os.pathsep)
    whole = ["--model.lora", "null", "--model.dtype", "float32", "--trainer.precision", "32-true"]
    done = command(
        SCRIPT, "--trainer.devices", 2, "--trainer.strategy", "fsdp2", *whole,
        "--trainer.callbacks+", "small.Small",
    )  # fmt: skip
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "alignkit: error" in line]
    assert len(told) == 1 and "shards cannot be written (" in told[0], done.stderr
    assert "File too large" in told[0] and "Traceback" not in done.stderr
    assert not list(Path("runs").rglob("*.distcp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["--trainer.default_root_dir", "memory://runs", "--trainer.logger", "false"],
        ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"],
    ],
    ids=["url", "plugin"],
)
def test_checkpoints_that_cannot_be_written_are_refused_before_a_step(
    changes: list[str], command: Callable
) -> None:
    whole = ["--model.lora", "null", "--model.dtype", "float32", "--trainer.precision", "32-true"]
    done = command(
        SCRIPT, "--trainer.devices", 2, "--trainer.strategy", "fsdp2", *whole, *changes,
        "--trainer.callbacks", "null", "--trainer.num_sanity_val_steps", 0,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "are written by all processes into a folder, without a plugin" in done.stderr
    assert "reached" not in done.stderr and not list(Path().rglob("*.ckpt"))
