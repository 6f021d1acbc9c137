"""One command as several processes, started as people start it, from an empty folder."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from alignkit.cli.launch import shards_blocks
from alignkit.cli.training import AlignCLI
from alignkit.engine import blocks_of
from tests.cli.test_fit import quick
from tests.cli.test_one_line import one_error

SCRIPT = [str(Path(sys.executable).with_name("alignkit"))]
MODULE = [sys.executable, "-m", "alignkit"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
TORCHRUN += ["-m", "alignkit"]
CODE = [sys.executable, "-c", "import sys; from alignkit.cli import main; sys.exit(main())"]


@pytest.fixture
def launched(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run one step of SFT here, as if a launcher had set the environment."""

    def run(environment: Mapping[str, str], *changes: object) -> tuple[int, str]:
        monkeypatch.setattr("alignkit.cli.command._OTHER_RANK_SECONDS", 0)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status, _, err = alignkit(*quick("demo/sft.yaml", model_dir, hh, text, 1), *changes)
        return status, err

    return run


def trained() -> dict[str, torch.Tensor]:
    """Return what the only run of the folder has saved."""
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "strategy"),
    [
        (SCRIPT, "ddp"),
        (MODULE, "ddp"),
        (CODE, "ddp"),
        (TORCHRUN, "ddp"),
        (SCRIPT, "fsdp2"),
        (SCRIPT, "ddp_fork"),
        (SCRIPT, "ddp_notebook"),
    ],
    ids=["script", "module", "code", "torchrun", "sharded", "fork", "notebook"],
)
def test_two_processes_train_once(
    start: list[str], strategy: str, command: Callable, tmp_path: Path
) -> None:
    """Whatever started them: one run's folder, one checkpoint."""
    done = command(start, "--trainer.devices", 2, "--trainer.strategy", strategy)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("version_*"))) == 1
    assert len(list(tmp_path.rglob("events.out.*"))) == 1
    assert trained()


@pytest.mark.parametrize(("strategy", "deferred"), [("fsdp2", True), ("auto", False)])
def test_a_command_that_will_shard_leaves_blocks_in_their_files(
    strategy: str, deferred: bool, launched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look(self: AlignCLI, subcommand: str) -> None:
        blocks = blocks_of(self.model.model)
        named = [item for block in blocks for item in block.named_parameters()]
        seen.extend(p.is_meta for name, p in named if "lora_" not in name)

    monkeypatch.setattr(AlignCLI, "_run_subcommand", look)
    status, err = launched({}, "--trainer.strategy", strategy)
    assert status == 0, err
    assert set(seen) == {deferred}
    theirs = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    assert shards_blocks(theirs)
    assert not shards_blocks("ddp")


@pytest.mark.slow
def test_torchrun_does_not_train_twice(command: Callable, tmp_path: Path) -> None:
    done = command(TORCHRUN, "--trainer.devices", 1)
    assert done.returncode != 0
    # Whoever is first to know says it; the other waits to be ended, and on a busy machine says it
    # too, with its rank.
    lines = [line for line in done.stderr.splitlines() if line.startswith("alignkit: error")]
    assert 1 <= len(lines) == len(set(lines)) <= 2, lines
    for line in lines:
        assert "trainer.devices=1" in line and "2 were started" in line
    assert not list(tmp_path.rglob("*.ckpt"))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SLURM |= {"SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("environment", "devices", "said"),
    [
        (SLURM, 1, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}, 2, "SLURM"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, 1, "ntasks-per-node"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, "WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2, "WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "4"}, 1, "PMI_SIZE"),
        ({"NODE_RANK": "1"}, 1, "NODE_RANK=1 with trainer.num_nodes=1"),
        ({"GROUP_RANK": "1"}, 1, "GROUP_RANK=1 with trainer.num_nodes=1"),
    ],
)
def test_a_launcher_that_disagrees_is_refused(
    environment: dict[str, str], devices: int, said: str, launched: Callable
) -> None:
    status, err = launched(environment, "--trainer.devices", devices)
    assert status == 2
    assert said in one_error(err)
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}],
    ids=str,
)
def test_a_launcher_that_agrees_is_not(environment: dict[str, str], launched: Callable) -> None:
    status, err = launched(environment)
    assert status == 0, err


MINE = """import os
import time
from alignkit import SFTModule
from alignkit.errors import AlignkitError

class Mine(SFTModule):
    def on_train_start(self):
        super().on_train_start()
        if str(self.global_rank) in os.environ.get("FAILING", ""):
            raise AlignkitError("this row cannot be read; mend it")
        if str(self.global_rank) in os.environ.get("DYING", ""):
            os.kill(os.getpid(), 9)
        if str(self.global_rank) in os.environ.get("HANGING", ""):
            time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({"FAILING": "0 1"}, 2, "alignkit: error: this row cannot be read; mend it"),
        ({"FAILING": "1"}, 2, "alignkit: error (rank 1): this row cannot be read; mend it"),
        ({"DYING": "1"}, 2, "alignkit: error: the process of rank 1 was killed by signal 9"),
    ],
    ids=["both", "other", "killed"],
)
def test_a_failing_rank_fails_the_command_in_one_line(
    environment: dict[str, str], status: int, said: str, command: Callable
) -> None:
    """By the installed script, which also finds a class in the working folder."""
    Path("mine.py").write_text(MINE)
    mine = ["--model", "mine.Mine", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    done = command(SCRIPT, *mine, environment=environment)
    assert done.returncode == status, done.stderr
    assert one_error(done.stderr).startswith(said)


@pytest.mark.slow
def test_a_hanging_rank_ends_the_others_after_the_time_out_that_is_set(command: Callable) -> None:
    """On the command line, as docs/cluster.md has it."""
    Path("mine.py").write_text(MINE)
    strategy = "lightning.pytorch.strategies.DDPStrategy"
    mine = ["--model", "mine.Mine", "--trainer.devices", 2, "--trainer.strategy", strategy]
    begun = time.monotonic()
    timed = ["--trainer.strategy.timeout", "0:00:40"]  # to meet, too
    done = command(SCRIPT, *mine, *timed, environment={"HANGING": "1"})
    assert done.returncode != 0 and time.monotonic() - begun < 280
    line = one_error(done.stderr)
    assert "the connection to another process of this run was lost" in line
    assert re.search("time-?out|timed out", line, re.IGNORECASE)


@pytest.mark.slow
def test_a_forked_rank_s_error_is_its_own_line(command: Callable) -> None:
    """torch hands it on as a message that holds the rank's whole trace."""
    Path("mine.py").write_text(MINE)
    mine = ["--model", "mine.Mine", "--trainer.devices", 2, "--trainer.strategy", "ddp_fork"]
    done = command(SCRIPT, *mine, environment={"FAILING": "1"})
    assert done.returncode == 2
    assert one_error(done.stderr) == "alignkit: error: this row cannot be read; mend it"


def test_nothing_follows_the_line(command: Callable) -> None:
    """Lightning's profiler fails once more where it is thrown away, with a trace of its own."""
    done = command(SCRIPT, "--trainer.profiler", "xla")
    assert done.returncode == 2
    assert "pip install torch_xla" in one_error(done.stderr)


@pytest.mark.parametrize("shell", ["| true", ">&-", ">&- 2>&-", "2>&1 | true"])
def test_training_outlives_its_readers(shell: str, command: Callable) -> None:
    bar = ["--trainer.enable_progress_bar", "true"]
    done = command(MODULE, *bar, shell=shell)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr
    assert trained()
