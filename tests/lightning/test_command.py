"""The same through the command: callbacks by name, and the files they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.models.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You passed .*AMP with fp16 is not supported on CPU"),
]


@pytest.fixture
def fit(
    alignkit: Callable[..., tuple[int, str, str]], hh: Path, model_dir: Callable[[str], Path]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``fit`` for two short epochs of DPO into ``kept``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return alignkit(
            "fit", "--model", "alignkit.DPOModule", "--model.base", model_dir("llama"),
            "--model.lora.targets", "all-linear", "--model.optimizer", "torch.optim.AdamW",
            "--model.optimizer.lr", "0.01", "--data", "alignkit.HHPreferenceDataModule",
            "--data.path", hh, "--data.tokens_per_batch", "700",
            "--data.max_train_examples", "20", "--data.max_val_examples", "4",
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_epochs", "2",
            "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.callbacks+", "alignkit.callbacks.Checkpoint",
            "--trainer.callbacks.dirpath", "kept", "--trainer.callbacks.save_last", "true",
            "--trainer.callbacks.monitor", "val/loss", *arguments,
        )  # fmt: skip

    return run


def added(name: str, **options: Any) -> list[str]:
    flags = [[f"--trainer.callbacks.{key}", str(value)] for key, value in options.items()]
    return ["--trainer.callbacks+", name, *[flag for pair in flags for flag in pair]]


@pytest.mark.parametrize(
    "average",
    [
        added("EMAWeightAveraging", decay=0.9),
        added("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1),
    ],
)
def test_an_average_answers_prompts_and_starts_the_next_stage(
    fit: Callable[..., tuple[int, str, str]],
    alignkit: Callable[..., tuple[int, str, str]],
    average: list[str],
) -> None:
    status, _, err = fit(*average)
    assert status == 0, err
    assert len(read_checkpoint("kept/last.ckpt")["state_dict"]) == 28
    status, _, err = alignkit(
        "generate", "--model", "kept/last.ckpt", "--prompts", "hi", "--max_new_tokens", "2"
    )
    assert status == 0, err
    status, _, err = fit("--model.init_from", "kept/last.ckpt")
    assert status == 0, err


def test_an_average_resumes(fit: Callable[..., tuple[int, str, str]]) -> None:
    average = added("EMAWeightAveraging", decay=0.9)
    assert fit(*average, "--trainer.max_epochs", "1")[0] == 0
    status, _, err = fit(*average, "--ckpt_path", "kept/last.ckpt", "--trainer.max_epochs", "3")
    assert status == 0, err
    newest = max(Path("kept").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    checkpoint = read_checkpoint(newest)
    assert checkpoint["global_step"] == 9
    assert checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys()


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (added("BackboneFinetuning"), "BackboneFinetuning: not supported"),
        (added("LearningRateMonitor"), "LearningRateMonitor: has no logger to write to"),
        (added("EarlyStopping", monitor="val_loss"), "EarlyStopping: monitor 'val_loss' is no"),
        (added("BatchSizeFinder"), "BatchSizeFinder: a batch is as large as its tokens"),
    ],
)
def test_refused_in_one_line(
    fit: Callable[..., tuple[int, str, str]], callback: list[str], line: str
) -> None:
    status, _, err = fit(*callback)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"alignkit: error: {line}")
    assert "Traceback" not in err


def test_tuners_run_by_name(fit: Callable[..., tuple[int, str, str]]) -> None:
    finder = added(
        "BatchSizeFinder", batch_arg_name="tokens_per_batch", init_val=400, max_trials=2,
        steps_per_trial=1,
    )  # fmt: skip
    status, _, err = fit(*finder)
    assert status == 0, err
    plan = read_checkpoint("kept/last.ckpt")["HHPreferenceDataModule"]["plan"]
    assert plan["tokens_per_batch"] == 800
    status, _, err = fit(*added("LearningRateFinder", num_training_steps=4))
    assert status == 0, err


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "16-mixed"])
def test_precisions_by_name(fit: Callable[..., tuple[int, str, str]], precision: str) -> None:
    status, _, err = fit("--trainer.precision", precision, "--trainer.max_epochs", "1")
    assert status == 0, err
    status, _, err = fit("--trainer.precision", precision, "--ckpt_path", "kept/last.ckpt")
    assert status == 0, err
