"""A signal ends a run in order: the step finished, a checkpoint named, a status that is not 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import read_checkpoint
from alignkit.tools.curves import read_scalars
from tests.cli.test_fit import quick

KILL = '''
import os, signal
from lightning.pytorch import Callback


class Kill(Callback):
    """Send this process signals, once: in a hook, when it is called for the n-th time."""

    def __init__(self, hook: str, call: int = 1, signals: list[int] = [15], rank: int = 0):
        self.hook, self.call, self.signals, self.rank = hook, call, signals, rank
        setattr(self, hook, self.act)

    def act(self, trainer, *args, **kwargs):
        if not (trainer.sanity_checking and "validation" in self.hook):
            self.call -= 1
        if self.call == 0 and trainer.global_rank == self.rank:
            self.call = -1
            for number in self.signals:
                os.kill(os.getpid(), number)
'''
WINDOWS = ["--trainer.accumulate_grad_batches", 2, "--model.lora.dropout", 0.1]
WINDOWS += ["--data.tokens_per_batch", 256, "--trainer.val_check_interval", 4]
UNSTOPPED: dict[str, torch.Tensor] = {}
LAST = "runs/demo/sft/version_0/last.ckpt"


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A run leaves a process's handlers as they were."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    yield
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


@pytest.fixture
def sft(
    model_dir: Callable,
    hh: Path,
    text: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Run SFT in this process, with a signal from a hook: the status and standard error."""
    Path("kills.py").write_text(KILL)
    monkeypatch.syspath_prepend(str(workplace))

    def run(*changes: object, command: str = "fit", **when: object) -> tuple[int, str]:
        kill = [f"--trainer.callbacks.init_args.{name}={value}" for name, value in when.items()]
        arguments = [command, *quick("demo/sft.yaml", model_dir, hh, text, 4)[1:], *WINDOWS]
        arguments += [*changes, *(["--trainer.callbacks+=kills.Kill"] if kill else []), *kill]
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.fixture
def whole(sft: Callable) -> Callable[[], dict[str, torch.Tensor]]:
    """The weights of a run that nothing stopped, trained once for all tests."""

    def run() -> dict[str, torch.Tensor]:
        if not UNSTOPPED:
            assert sft()[0] == 0
            newest = max(Path("runs/demo/sft").glob("version_*"), key=lambda path: path.name)
            UNSTOPPED.update(weights(newest / "last.ckpt"))
        return UNSTOPPED

    return run


@pytest.mark.parametrize(
    ("hook", "call", "step", "number", "status"),
    [
        # In the middle of the second window of two batches.
        ("on_train_batch_start", 3, 2, signal.SIGTERM, 143),
        ("on_train_batch_end", 4, 2, signal.SIGINT, 130),
        # While the last checkpoint is still to be written.
        ("on_train_end", 1, 4, signal.SIGTERM, 143),
        # The second step's validation, at batch 4.
        ("on_validation_batch_start", 1, 2, signal.SIGTERM, 143),
    ],
)
def test_the_step_is_finished_saved_and_resumed_exactly(
    sft: Callable,
    whole: Callable,
    caplog: pytest.LogCaptureFixture,
    hook: str,
    call: int,
    step: int,
    number: signal.Signals,
    status: int,
) -> None:
    assert sft(hook=hook, call=call, signals=[int(number)])[0] == status
    assert f"{number.name}: stopped after step {step}; {LAST} holds it" in caplog.text
    assert torch.load(LAST, weights_only=True)["global_step"] == step
    assert sft("--ckpt_path", "runs/demo/sft")[0] == 0
    resumed = read_checkpoint("runs/demo/sft")["state_dict"]
    assert all(torch.equal(resumed[name], value) for name, value in whole().items())


def test_a_second_ctrl_c_stops_at_once(sft: Callable) -> None:
    status, err = sft(hook="on_train_batch_start", call=3, signals=[int(signal.SIGINT)] * 2)
    assert status == 130
    assert "finishing this step, then saving; once more stops at once" in err
    assert "SIGINT: stopped at once" in err
    assert not Path(LAST).exists()


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start"])
def test_before_training_there_is_one_line(sft: Callable, hook: str) -> None:
    status, err = sft(hook=hook)
    assert status == 143
    assert [line for line in err.splitlines() if "SIGTERM" in line] == [
        "alignkit: SIGTERM: stopped at once"
    ]
    assert "Traceback" not in err
    assert not list(Path("runs").rglob("*.ckpt"))


def test_an_evaluation_stops_at_once(sft: Callable) -> None:
    assert sft(command="validate", hook="on_validation_batch_start")[0] == 143


def test_without_checkpoints_it_says_that_nothing_is_saved(
    sft: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    off = ["--trainer.callbacks", "[]", "--trainer.enable_checkpointing", "false"]
    assert sft(*off, hook="on_train_batch_start", call=3)[0] == 143
    assert "SIGTERM: stopped after step 2; nothing is saved, as checkpoints are off" in caplog.text


@pytest.fixture
def slurm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begin a SLURM job whose ``scontrol`` writes what it is asked to the file ``requeued``."""
    Path("bin").mkdir()
    Path("bin/scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").absolute()), prepend=os.pathsep)

    def begin(job: int, **more: object) -> None:
        given = {"NTASKS": 1, "JOB_ID": job, "JOB_NAME": "train", "PROCID": 0, "LOCALID": 0}
        given |= {"NODEID": 0, "NODELIST": "localhost", "NNODES": 1, **more}
        for name, value in given.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return begin


USR1 = {"hook": "on_train_batch_start", "call": 3, "signals": [int(signal.SIGUSR1)]}


def test_slurm_requeues_and_the_next_start_goes_on(
    sft: Callable, whole: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """``scontrol requeue`` with the job's id, and the same command resumes without a flag."""
    slurm(4711)
    status, _ = sft(**USR1)
    assert status == 128 + signal.SIGUSR1
    assert Path("requeued").read_text() == "requeue 4711\n"
    assert "SIGUSR1: stopped after step 2; " in caplog.text
    assert torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
    assert sft()[0] == 0
    assert "ckpt_path hpc: taking " in caplog.text
    resumed = weights("runs/demo/sft/version_1/last.ckpt")
    Path("hpc_ckpt_1.ckpt").unlink()
    assert all(torch.equal(resumed[name], value) for name, value in whole().items())


def test_a_run_takes_its_own_file_alone(
    sft: Callable,
    slurm: Callable,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not that of another task of its array, of another job, or of another command of its own."""
    array = {"ARRAY_JOB_ID": 900}
    slurm(901, ARRAY_TASK_ID=0, **array)
    assert sft(**USR1)[0] == 138
    slurm(902, ARRAY_TASK_ID=1, **array)
    assert sft("--model.optimizer.lr", 1e-5, **USR1)[0] == 138
    assert "ckpt_path hpc" not in caplog.text
    assert Path("requeued").read_text() == "requeue 900_0\nrequeue 900_1\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["alignkit", "fit", "--another"])
        assert sft()[0] == 0
    assert "hpc_ckpt_2.ckpt: another command of this job wrote it; it is left alone" in caplog.text
    caplog.clear()
    slurm(901, ARRAY_TASK_ID=0, **array)
    assert sft()[0] == 0
    assert f"ckpt_path hpc: taking {Path('hpc_ckpt_1.ckpt').absolute()}" in caplog.text


def test_a_requeued_run_goes_on_whatever_its_command_names(
    sft: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ``--ckpt_path`` was its beginning; a measurement takes what it names."""
    assert sft("--trainer.max_steps", 1)[0] == 0
    begun = next(Path().rglob("last.ckpt"))
    slurm(4711)
    assert sft("--ckpt_path", begun, **USR1)[0] == 138
    saved = torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    assert saved > 1
    begun.unlink()  # as a run that keeps the best alone does
    caplog.clear()
    assert sft("--ckpt_path", begun)[0] == 0
    assert "ckpt_path hpc: taking " in caplog.text
    caplog.clear()
    assert sft(command="validate")[0] == 0
    assert "measures the base" in caplog.text and "hpc" not in caplog.text
    Path("hpc_ckpt_1.ckpt").unlink()
    status, err = sft("--ckpt_path", begun)
    assert status == 2 and f"{begun}" in err and "no such checkpoint" in err


def test_no_other_name_or_signal_keeps_a_job_from_its_requeue(
    sft: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Names that only look like a checkpoint's, a damaged one; SIGTERM right after the signal."""
    slurm(4711)
    Path("ckpt_old").mkdir()
    Path("hpc_ckpt_final.ckpt").touch()
    both = [int(signal.SIGUSR1), int(signal.SIGTERM)]
    assert sft(**{**USR1, "signals": both})[0] == 128 + signal.SIGUSR1
    assert Path("requeued").read_text() == "requeue 4711\n"
    (saved,) = Path().glob("hpc_ckpt_[0-9].ckpt")
    half = Path("hpc_ckpt_2.ckpt")
    half.write_bytes(saved.read_bytes()[:1000])
    assert sft()[0] == 0
    assert f"{half.absolute()}: " in caplog.text and "; it is passed over" in caplog.text
    assert f"ckpt_path hpc: taking {saved.absolute()}" in caplog.text


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_start", 7), ("on_validation_epoch_start", 2)]
)
def test_a_run_that_is_done_is_not_requeued(
    sft: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture, hook: str, call: int
) -> None:
    """The signal in the last step, or in the validation after it: the run ends as it would have."""
    slurm(4711)
    assert sft(hook=hook, call=call, signals=[int(signal.SIGUSR1)])[0] == 0
    assert "no step is left: the run ends, and the job is not requeued" in caplog.text
    assert not Path("requeued").exists() and not list(Path().glob("hpc_ckpt_*"))
    saved = torch.load(LAST, weights_only=True)
    assert saved["global_step"] == 4
    scalars = read_scalars(Path(LAST).parent)
    assert len(scalars["val/loss"]) == 2  # after steps 2 and 4
    best = torch.load(Path(LAST).with_name("best.ckpt"), weights_only=True)
    lowest = min(value for _, value in scalars["val/loss"])
    assert lowest == scalars["val/loss"][1][1] and best["global_step"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--trainer.default_root_dir", "memory://runs"], "it is a URL"),
        (["--trainer.default_root_dir", "file"], "File exists"),
    ],
)
def test_a_job_without_a_place_for_its_file_saves_its_last(
    sft: Callable,
    slurm: Callable,
    caplog: pytest.LogCaptureFixture,
    changes: list[str],
    said: str,
) -> None:
    Path("file").touch()
    slurm(4711)
    assert sft(*changes, **USR1)[0] == 138
    assert f"{changes[0].strip('-')} {changes[1]}: holds no checkpoint to go on from" in caplog.text
    assert said in caplog.text and "is not requeued" in caplog.text
    assert not Path("requeued").exists()
    assert torch.load(LAST, weights_only=True)["global_step"] == 2


def test_a_file_that_is_not_written_leaves_no_place(
    sft: Callable, slurm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise AlignkitError("no space left")

    slurm(4711)
    monkeypatch.setattr("alignkit.modules.checkpoint_io.write_archive", full)
    status, err = sft(**USR1)
    assert status == 2 and "no space left" in err
    assert not list(Path().glob("hpc_ckpt_*")) and not Path("requeued").exists()


def test_a_requeued_run_goes_on_from_its_furthest_checkpoint(
    sft: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """It was requeued, stopped again by SIGTERM further on, and started once more."""
    slurm(4711)
    assert sft(**USR1)[0] == 138
    last = Path(LAST.replace("version_0", "version_1"))
    assert sft(**{**USR1, "call": 1, "signals": [int(signal.SIGTERM)]})[0] == 143
    assert torch.load(last, weights_only=True)["global_step"] == 3
    caplog.clear()
    assert sft("--ckpt_path", "last")[0] == 0
    assert f"ckpt_path hpc: taking {last}" in caplog.text


def test_a_trial_run_is_not_requeued(sft: Callable, slurm: Callable) -> None:
    slurm(4711)
    assert sft("--trainer.fast_dev_run", 4, **USR1)[0] == 138
    assert not Path("requeued").exists() and not list(Path().glob("hpc_ckpt_*"))


def test_a_measurement_takes_no_file_by_itself_wherever_runs_lie(
    sft: Callable, slurm: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    slurm(4711)
    place = ["--trainer.default_root_dir", "memory://measured"]
    fsspec.filesystem("memory").touch("/measured/hpc_ckpt_1.ckpt")
    assert sft(*place, command="validate")[0] == 0
    assert "measures the base" in caplog.text and "Loaded model weights" not in caplog.text


def start(model_dir: Callable, hh: Path, text: Path, *changes: object) -> subprocess.Popen[str]:
    """Start the command as a process and the leader of its group, as a terminal does."""
    arguments = quick("demo/sft.yaml", model_dir, hh, text, 10_000)
    arguments += ["--trainer.val_check_interval", 10_000, "--data.tokens_per_batch", 256]
    return subprocess.Popen(
        [sys.executable, "-m", "alignkit", *map(str, [*arguments, *changes])],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_whole_group_is_told_workers_too(
    model_dir: Callable, hh: Path, text: Path, workplace: Path, number: int, status: int
) -> None:
    process = start(model_dir, hh, text, "--data.num_workers", 2, "--trainer.log_every_n_steps", 1)
    wait_for(process, "training")
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert ("stopped after step" in err) == Path(LAST).exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_agree_whoever_is_told(
    model_dir: Callable, hh: Path, text: Path, sft: Callable, workplace: Path, rank: int
) -> None:
    ranks = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    kill = ["--trainer.callbacks+=kills.Kill", "--trainer.callbacks.init_args.hook"]
    kill += ["on_train_batch_start", "--trainer.callbacks.init_args.call", 3]
    kill += ["--trainer.callbacks.init_args.rank", rank]
    process = start(model_dir, hh, text, *ranks, *WINDOWS, *kill)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("SIGTERM: stopped after step 2; ") == 1
    assert torch.load(LAST, weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_a_signal_during_the_imports_is_one_line(workplace: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "alignkit", "audit", "x"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(process, "torch._C")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "alignkit: SIGINT: stopped at once" in err and "Traceback" not in err


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"no {text!r}")
