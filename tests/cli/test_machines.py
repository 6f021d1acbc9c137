"""Two starts on this machine, as many as two machines of one device have, by each launcher."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cli.test_launch import MINE, SCRIPT, SLURM, trained

Ended = list[subprocess.CompletedProcess[str]]
Machines = Callable[..., Ended]
LAUNCHERS = ("torchrun", "srun", "hand")
# docs/cluster.md, "When a process dies".
LOST = "alignkit: error: the connection to another process of this run was lost"

SIGNALLED = """import os
import signal
from alignkit import SFTModule

class Mine(SFTModule):
    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step == 2 and str(self.global_rank) in os.environ.get("TOLD", ""):
            os.kill(os.getpid(), signal.SIGUSR1)
"""


def machine(rank: int, port: int, launcher: str) -> tuple[list[str], dict[str, str]]:
    """What is started on one of the machines, and in which environment."""
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank"]
        start += [str(rank), "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
        return [*start, "--master_port", str(port), "-m", "alignkit"], {}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "srun":
        job = {"NNODES": "2", "NTASKS_PER_NODE": "1", "JOB_NUM_NODES": "2", "PROCID": str(rank)}
        job |= {"NODEID": str(rank), "JOB_ID": "4711"}
        return SCRIPT, address | SLURM | {f"SLURM_{name}": value for name, value in job.items()}
    return SCRIPT, address | {"NODE_RANK": str(rank)}


@pytest.fixture
def machines(command: Callable, model_dir: Callable) -> Machines:
    """``machines(launcher, *changes, **environment)``: how both ended, the first machine first."""
    model_dir("llama")  # which two starts at once would make twice

    def run(launcher: str, *changes: object, nodes: int = 2, **environment: str) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def start(rank: int) -> subprocess.CompletedProcess[str]:
            arguments, mine = machine(rank, port, launcher)
            counts = ["--trainer.num_nodes", nodes, "--trainer.devices", 1]
            # As in a job whose command line names a machine or its disk.
            own = ["--trainer.enable_model_summary", "false"] if rank else []
            done: subprocess.CompletedProcess[str] = command(
                arguments, *counts, *own, *changes, environment=mine | environment
            )
            return done

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(start, range(2)))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_machines_train_once(launcher: str, machines: Machines, tmp_path: Path) -> None:
    ended = machines(launcher)
    assert [done.returncode for done in ended] == [0, 0], "".join(done.stderr for done in ended)
    assert len(list(tmp_path.rglob("version_*"))) == 1
    assert len(list(tmp_path.rglob("events.out.*"))) == 1
    assert trained()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_machine_that_fails_stops_the_other(
    launcher: str, machines: Machines, tmp_path: Path
) -> None:
    """Long before the process group's time-out, with the line of the one that failed.

    A start that takes longer than the fixture allows fails.
    """
    Path("mine.py").write_text(MINE)
    first, second = machines(launcher, "--model", "mine.Mine", FAILING="1")
    assert first.returncode not in (0, None) and second.returncode not in (0, None)
    assert "this row cannot be read; mend it" in second.stderr
    if launcher != "torchrun":  # whose agents tell each other, and may be quicker
        assert LOST in first.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_machines_that_the_trainer_does_not_count_are_refused(
    launcher: str, machines: Machines, tmp_path: Path
) -> None:
    """Each would train the whole run. Started by hand: `test_launch.py`."""
    for done in machines(launcher, nodes=1):
        assert done.returncode != 0
        assert "trainer.num_nodes=1 makes 1 processes, but 2 were started" in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("told", ["1", "0 1"], ids=["the second alone", "both"])
def test_slurm_requeues_a_job_of_two_machines_once(
    told: str, machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever task the signal reaches: one file, one ``scontrol requeue``, and both go on."""
    Path("mine.py").write_text(SIGNALLED)
    Path("bin").mkdir()
    Path("bin/scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").absolute()), prepend=":")
    job = ["--model", "mine.Mine", "--trainer.max_steps", 4, "--data.tokens_per_batch", 256]
    ended = machines("srun", *job, TOLD=told)
    assert [done.returncode for done in ended] == [138, 138], ended
    assert Path("requeued").read_text() == "requeue 4711\n"
    assert [path.name for path in tmp_path.rglob("hpc_ckpt_*")] == ["hpc_ckpt_1.ckpt"]
    assert torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    first, second = machines("srun", *job)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "ckpt_path hpc: taking " in first.stderr
    assert len(list(tmp_path.rglob("version_*"))) == 2
    last = max(tmp_path.rglob("last.ckpt"), key=lambda path: path.parent.name)
    assert torch.load(last, weights_only=True)["global_step"] == 4
