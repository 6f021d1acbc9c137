"""Whoever refuses a command, it ends in one line that names the option, and not with 0."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.cli import main
from tests.cli.test_fit import quick

LOGGERS = "lightning.pytorch.loggers"
CALLBACK = ("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss")

# What is given, and what the line has to say about it.
MISTAKES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "gpu": (("--trainer.accelerator", "gpu"), ("--trainer.accelerator",)),
    "cuda": (("--trainer.accelerator", "cuda"), ("--trainer.accelerator", "cpu")),
    "tpu": (("--trainer.accelerator", "tpu"), ("pip install torch_xla",)),
    "accelerator": (("--trainer.accelerator", "gpuu"), ("gpuu", "--trainer.accelerator")),
    "precision": (("--trainer.precision", "17"), ("trainer.precision", "bf16-mixed", "'17'")),
    "strategy": (("--trainer.strategy", "dpp"), ("trainer.strategy=dpp", "use ddp")),
    "fsdp": (("--trainer.strategy", "fsdp"), ("trainer.strategy=fsdp: FSDPStrategy", "use fsdp2")),
    "deepspeed": (("--trainer.strategy", "deepspeed_stage_2"), ("DeepSpeedStrategy", "use fsdp2")),
    "xla": (("--trainer.strategy", "xla"), ("XLAStrategy", "ddp, ddp_fork")),
    "sharded": (
        ("--trainer.strategy", "fsdp2", "--trainer.precision", "64-true"),
        ("fsdp2: does not work with trainer.precision=64-true", "use ddp"),
    ),
    "sharded-average": (
        ("--trainer.strategy", "fsdp2", "--trainer.callbacks+", "EMAWeightAveraging"),
        ("fsdp2: does not work with EMAWeightAveraging", "use ddp"),
    ),
    "sharded-rates": (
        ("--trainer.strategy", "fsdp2", "--trainer.callbacks+", "LearningRateFinder"),
        ("fsdp2: does not work with LearningRateFinder", "use ddp"),
    ),
    "spawn": (("--trainer.strategy", "ddp_spawn", "--trainer.devices", 2), ("use ddp, ddp_fork",)),
    "wandb": (("--trainer.logger", f"{LOGGERS}.WandbLogger"), ("pip install wandb",)),
    "mlflow": (("--trainer.logger", f"{LOGGERS}.MLFlowLogger"), ("pip install mlflow",)),
    "comet": (("--trainer.logger", f"{LOGGERS}.CometLogger"), ("pip install comet-ml",)),
    "neptune": (("--trainer.logger", f"{LOGGERS}.NeptuneLogger"), ("trainer.logger", "Neptune")),
    "logger": (("--trainer.logger", "WandLogger"), ("trainer.logger", "did you mean WandbLogger?")),
    "interval": (
        ("--trainer.val_check_interval", 0.5, "--trainer.check_val_every_n_epoch", "null"),
        ("--trainer.val_check_interval",),
    ),
    "interval-long": (
        ("--trainer.val_check_interval", 1000, "--trainer.check_val_every_n_epoch", 1),
        ("--trainer.val_check_interval", "1000"),
    ),
    "endless": (
        ("--trainer.max_steps", -1, "--trainer.max_epochs", "null"),
        ("--trainer.max_epochs", "--trainer.max_steps"),
    ),
    "steps": (("--trainer.max_steps", -5), ("--trainer.max_steps",)),
    "monitor": (
        ("--trainer.callbacks.init_args.monitor", "val/los"),
        ("monitor 'val/los'", "val/loss"),
    ),
    "stop-monitor": (
        ("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/los"),
        ("monitor 'val/los'", "val/loss"),
    ),
    "stop-mode": ((*CALLBACK, "--trainer.callbacks.mode", "mn"), ("mn", "--trainer.callbacks")),
    "no-monitor": (("--trainer.callbacks+", "EarlyStopping"), ("trainer.callbacks", "monitor")),
    "limit": (("--trainer.limit_train_batches", 1.5), ("--trainer.limit_train_batches", "1.5")),
    "overfit": (("--trainer.overfit_batches", 1.5), ("--trainer.overfit_batches",)),
    "devices-0": (("--trainer.devices", 0), ("--trainer.devices",)),
    "devices--1": (("--trainer.devices", -1), ("--trainer.devices",)),
    "devices-many": (("--trainer.devices", 4096), ("trainer.devices=4096", "cores")),
    "nodes": (("--trainer.num_nodes", 2), ("trainer.num_nodes=2", "MASTER_ADDR")),
    "nodes-0": (("--trainer.num_nodes", 0), ("--trainer.num_nodes",)),
    "callback": (("--trainer.callbacks+", "Chekpoint"), ("did you mean Checkpoint?",)),
    "callback-option": (
        (*CALLBACK, "--trainer.callbacks.patiense", 3),
        ("trainer.callbacks.patiense", "did you mean patience?"),
    ),
    "callback-type": (
        (*CALLBACK, "--trainer.callbacks.patience", "three"),
        ("trainer.callbacks.patience: expected int, got 'three'",),
    ),
    "save-top-k": (
        ("--trainer.callbacks.init_args.save_top_k", -3),
        ("save_top_k=-3", "--trainer.callbacks"),
    ),
    "rates-unlogged": (
        ("--trainer.callbacks+", "LearningRateMonitor", "--trainer.logger", "false"),
        ("LearningRateMonitor", "set trainer.logger"),
    ),
    "clip-algorithm": (
        ("--trainer.gradient_clip_algorithm", "normm"),
        ("normm", "--trainer.gradient_clip_algorithm"),
    ),
    "clip-negative": (("--trainer.gradient_clip_val", -1), ("trainer.gradient_clip_val=-1",)),
    "accumulate": (("--trainer.accumulate_grad_batches", 0), ("accumulate_grad_batches=0",)),
    "root": (
        ("--trainer.logger", "true", "--trainer.default_root_dir", "/dev/null/runs"),
        ("/dev/null", "Not a directory"),
    ),
    "events": (
        ("--trainer.logger.save_dir", "/dev/null/runs"),
        ("/dev/null", "Not a directory", "--trainer.logger.save_dir"),
    ),
    "config-missing": (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
    "config-broken": (("--config", "broken.yaml"), ("broken.yaml:2: is not valid YAML",)),
    "config-empty": (("--config", "empty.yaml"), ("empty.yaml: is empty",)),
    "config-binary": (("--config=binary.yaml",), ("binary.yaml: is not UTF-8 text",)),
    "config-class-key": (
        ("--config", "class.yaml"),
        ("class.yaml: init_argz: no such key beside class_path of alignkit.SFTModule",),
    ),
    "validation-never": (
        ("--trainer.val_check_interval", 0),
        ("trainer.val_check_interval=0: must be above 0", "--trainer.limit_val_batches 0"),
    ),
    "workers": (("--data.num_workers", -1), ("data.num_workers=-1",)),
    "config-list": (("--config", "list.yaml"), ("list.yaml: holds a list",)),
    "config-key": (
        ("--config", "key.yaml"),
        ("key.yaml: trainer.max_stepz", "did you mean trainer.max_steps?; see alignkit fit"),
    ),
    "checkpoint-folder": (("--ckpt_path", "folder"), ("folder",)),
    "near": (
        ("--trainer.max_step", 3),
        ("--trainer.max_step 3", "did you mean trainer.max_steps?"),
    ),
    "nested-near": (("--model.lora.alfa", 3), ("model.lora.alfa", "did you mean alpha?")),
    "unknown": (("--foo", 3), ("--foo 3",)),
    "type": (("--trainer.max_steps", "ten"), ("trainer.max_steps: expected int, got 'ten'",)),
    "nested-type": (("--model.lora.r", "x"), ("model.lora.r: expected int, got 'x'",)),
    "rate": (("--model.optimizer.lr", "fast"), ("model.optimizer.lr: expected float",)),
    "warm-up": (("--model.warmup_steps", -3), ("model.warmup_steps=-3",)),
    "rate-ratio": (("--model.lora_plus_ratio", 0), ("model.lora_plus_ratio=0",)),
    "rate-whole": (
        ("--model.lora", "null", "--model.lora_plus_ratio", 16),
        ("model.lora_plus_ratio=16", "leave it out"),
    ),
    "rate-negative": (("--model.optimizer.lr", -1), ("learning rate", "--model.optimizer")),
    "optimizer": (("--model.optimizer", "AdmW"), ("did you mean AdamW?",)),
    "optimizer-of-others": (
        ("--model.optimizer", "transformers.Adafactor", "--model.optimizer.lr", 0.1),
        ("relative_step=True", "--model.optimizer"),
    ),
    "optimizer-option": (
        ("--model.optimizer", "SGD", "--model.optimizer.betas", 0.9),
        ("model.optimizer.betas: no such option",),
    ),
    "model": (("--model", "torch.nn.Linear"), ("torch.nn.Linear", "AlignmentModule")),
    "seed": (("--seed_everything", -5), ("-5", "--seed_everything")),
    "time": (("--trainer.max_time", "1h"), ("trainer.max_time=1h", "DD:HH:MM:SS")),
    "profiler": (("--trainer.profiler", "simpl"), ("--trainer.profiler",)),
    "checkpoints-off": (
        ("--trainer.enable_checkpointing", "false"),
        ("--trainer.enable_checkpointing",),
    ),
    "fault-of-ours": (
        ("--trainer.callbacks+", "mine.Broken", "--trainer.callbacks.kind", "KeyError"),
        ("KeyError", "mine.py:9", "--debug"),
    ),
    "memory": (
        ("--trainer.callbacks+", "mine.Broken", "--trainer.callbacks.kind", "MemoryError"),
        ("out of memory", "data.tokens_per_batch"),
    ),
    "disk": (
        ("--trainer.callbacks+", "mine.Broken", "--trainer.callbacks.kind", "OSError"),
        ("No space left on device",),
    ),
}
MINE = """import builtins
from lightning.pytorch import Callback

class Broken(Callback):
    def __init__(self, kind: str):
        self.kind = kind
    def on_train_start(self, trainer, pl_module):
        about = (28, "No space left on device") if self.kind == "OSError" else ("lost",)
        raise getattr(builtins, self.kind)(*about)
"""


def one_error(err: str) -> str:
    """Return the only line about an error; no trace and no dump lies beside it."""
    assert "Traceback" not in err and "Namespace(" not in err, err
    (line,) = [line for line in err.splitlines() if "error" in line.lower()]
    assert line.startswith("alignkit: error")
    return line


@pytest.fixture
def files(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files to be wrong about."""
    Path("broken.yaml").write_text("a: [1\nb: }")
    Path("empty.yaml").write_text("# nothing yet\n")
    Path("binary.yaml").write_bytes(b"\x00\xff\xfe")
    Path("list.yaml").write_text("- a\n- b\n")
    Path("key.yaml").write_text("trainer:\n  max_stepz: 3\n")
    Path("class.yaml").write_text("model: {class_path: alignkit.SFTModule, init_argz: {lr: 1}}\n")
    Path("mine.py").write_text(MINE)
    Path("folder").mkdir()
    monkeypatch.syspath_prepend(str(workplace))
    return workplace


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, files: Path, alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    changes, said = MISTAKES[name]
    status, _, err = alignkit(*quick("demo/sft.yaml", model_dir, hh, text, 1), *changes)
    assert status == (1 if name in ("fault-of-ours", "memory") else 2)
    line = one_error(err)
    assert not [part for part in said if part not in line], line


def test_debug_shows_the_trace_before_the_line(
    files: Path, alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    """Wherever it stands, for a fault and for a mistake, for training and for tools."""
    arguments = quick("demo/sft.yaml", model_dir, hh, text, 1)
    broken = ["--trainer.callbacks+", "mine.Broken", "--trainer.callbacks.kind", "KeyError"]
    for command in (
        ["--debug", *arguments, *broken],
        ["fit", "--debug", *arguments[1:], "--trainer.accelerator", "gpu"],
        ["generate", "--model", "nowhere", "--prompts", "a", "--debug"],
    ):
        status, _, err = alignkit(*command)
        assert status != 0
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("alignkit: error: ")


@pytest.mark.parametrize("command", ["fit", "generate"])
def test_help_names_debug_and_configurations_do_not(command: str, alignkit: Callable) -> None:
    status, out, _ = alignkit(command, "--help")
    assert status == 0 and "--debug" in out
    assert "print_completion" not in out  # `alignkit completion` prints it
    status, out, _ = alignkit("fit", "--print_config", "--debug")
    assert "debug" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "subcommand"),
        (["fitt"], "fitt"),
        (["generate"], "give --model; see alignkit generate --help"),
        (["judge"], "give PATH and --model; see"),
        (["fit"], "give --data and --model, or a --config FILE that has both; see alignkit fit"),
        (
            ["fit", "--model", "SFTModule"],
            "give --model.base; see alignkit fit",
        ),
        (["generate", "--modle", "x"], "did you mean model?"),
    ],
)
def test_a_mistake_in_a_command(arguments: list[str], said: str, alignkit: Callable) -> None:
    status, _, err = alignkit(*arguments)
    assert status == 2
    assert said in one_error(err)


@pytest.mark.parametrize(
    "logger", [["--trainer.logger", "false"], ["--trainer.logger.version", 0]], ids=["none", "same"]
)
def test_a_second_run_writes_over_nothing(
    logger: list[object], alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    """Neither a user's config.yaml nor the first run's; each is saved if the run has a folder."""
    Path("config.yaml").write_text("# mine\n")
    before: dict[Path, bytes] = {}
    for steps in (1, 2):
        arguments = quick("demo/sft.yaml", model_dir, hh, text, steps)
        status, _, err = alignkit(*arguments, *logger)
        assert status == 0, err
        assert {path: path.read_bytes() for path in before} == before
        before = {path: path.read_bytes() for path in Path().rglob("*.ckpt")}
        assert len(before) == 2 * steps  # best and last of each run
    assert Path("config.yaml").read_text() == "# mine\n"
    saved = sorted(p.name for p in Path("runs").rglob("config*.yaml"))
    assert saved == ([] if "false" in logger else ["config-v1.yaml", "config.yaml"])


def test_a_full_disk_leaves_no_half_of_a_configuration(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(old: object, new: object) -> None:
        if Path(str(new)).name == "config.yaml":
            raise OSError(28, "No space left on device")
        os.rename(str(old), str(new))

    monkeypatch.setattr("alignkit.utils.atomic.os.replace", full)
    status, _, err = alignkit(*quick("demo/sft.yaml", model_dir, hh, text, 1))
    assert status == 2
    assert "config.yaml: cannot be written (No space left on device)" in one_error(err)
    assert not list(Path("runs").rglob("config.yaml"))


def test_resuming_with_another_optimizer_is_one_line(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    arguments = quick("demo/sft.yaml", model_dir, hh, text, 1)
    assert alignkit(*arguments)[0] == 0
    other = ["--trainer.max_steps", 2, "--model.optimizer", "SGD", "--model.optimizer.lr", 0.1]
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    status, _, err = alignkit(*arguments, *other, "--ckpt_path", checkpoint)
    assert status == 2
    assert "SGD" in one_error(err)


def test_a_data_worker_s_error_is_its_own_line(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, files: Path
) -> None:
    """torch hands it on as a message that holds the worker's whole trace."""
    Path("torn.py").write_text(
        "from alignkit import HHSFTDataModule\n"
        "from alignkit.errors import AlignkitError\n"
        "def refuse(examples):\n"
        "    raise AlignkitError('data.jsonl:3: cannot be collated; mend it')\n"
        "class Torn(HHSFTDataModule):\n"
        "    def train_dataloader(self):\n"
        "        loader = super().train_dataloader()\n"
        "        loader.collate_fn = refuse\n"
        "        return loader\n"
    )
    arguments = quick("demo/sft.yaml", model_dir, hh, text, 1)
    status, _, err = alignkit(*arguments, "--data", "torn.Torn", "--data.num_workers", 1)
    assert status == 2
    assert one_error(err) == "alignkit: error: data.jsonl:3: cannot be collated; mend it"


def test_main_takes_arguments_without_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves those as they are: Lightning starts the other ranks with them."""
    monkeypatch.setattr("sys.argv", ["/somewhere/alignkit", "--own"])
    assert main(["fit", "--foo"]) == 2
    import sys

    assert sys.argv == ["/somewhere/alignkit", "--own"]
