"""Several processes, started as a user starts them: from a folder that is not the clone's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.test_fit import quick

LAUNCHERS = {
    "console script": [str(Path(sys.executable).with_name("alignkit"))],
    "module": [sys.executable, "-m", "alignkit"],
    "torchrun": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "alignkit",
    ],
}  # fmt: skip


def launch(
    launcher: str, arguments: list[object], devices: int
) -> subprocess.CompletedProcess[str]:
    flags = ["--trainer.devices", devices, "--trainer.strategy", "ddp" if devices > 1 else "auto"]
    command = [*LAUNCHERS[launcher], *map(str, [*arguments, *flags])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_from_an_empty_folder(
    launcher: str, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    arguments = quick("demo/dpo.yaml", model_dir, hh, text, steps=2)
    done = launch(launcher, arguments, devices=2)
    assert done.returncode == 0, done.stderr[-2000:]
    (last,) = Path("runs/demo/dpo").glob("version_0/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert len(checkpoint["rng"]) == 2  # a random state of each rank: two have trained


@pytest.mark.slow
def test_two_processes_that_would_each_train_alone_are_refused(
    model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    arguments = quick("demo/dpo.yaml", model_dir, hh, text, steps=1)
    done = launch("torchrun", arguments, devices=1)
    assert done.returncode != 0
    assert "torchrun started 2 processes, but trainer.devices × trainer.num_nodes is 1" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not list(Path().rglob("*.ckpt"))
