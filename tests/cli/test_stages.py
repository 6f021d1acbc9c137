"""``alignkit lora``, ``sft`` and ``dpo``: a thin translation to ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.cli.stages import STAGES, fit_arguments, stage_help

DATA = {"lora": "text", "sft": "hh", "dpo": "hh"}


@pytest.fixture
def printed(alignkit: Callable) -> Callable[..., dict[str, Any]]:
    """The configuration that a command would train by."""

    def run(*arguments: object) -> dict[str, Any]:
        status, out, err = alignkit(*arguments, "--print_config")
        assert status == 0, err
        config: dict[str, Any] = yaml.safe_load(out)
        return config

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_base_and_data_are_enough(stage: str, printed: Callable) -> None:
    config = printed(stage, "--base", "some/model", "--data", "rows.jsonl")
    assert config["model"]["class_path"] == f"alignkit.{STAGES[stage].model}"
    assert config["data"]["class_path"] == f"alignkit.{STAGES[stage].data}"
    assert config["model"]["init_args"]["base"] == "some/model"
    assert config["data"]["init_args"]["path"] == "rows.jsonl"
    assert config["model"]["init_args"]["lora"] == "auto"  # every linear layer is found
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == STAGES[stage].lr
    assert config["trainer"]["max_epochs"] == 1
    logger = config["trainer"]["logger"]["init_args"]
    assert (logger["save_dir"], logger["name"]) == (f"./runs/{stage}", "")


def test_short_flags_beat_others_and_those_the_defaults(printed: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "trainer: {max_epochs: 7, gradient_clip_val: 2.0}\ndata: {init_args: {max_length: 99}}\n"
    )
    config = printed(
        "dpo", "--base", "b", "--data", "d", "--loss", "IPO", "--beta", "0.3", "--lr", "1e-5",
        "--epochs", "3", "--rank", "4", "--tokens-per-batch", "777", "--out", "here/mine",
        "--resume", "--config", tmp_path / "mine.yaml", "--trainer.devices", "2",
        "--trainer.gradient_clip_val=0.5", "--seed_everything", "5", "--model.lora.r", "64",
    )  # fmt: skip
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["loss"]["class_path"].endswith(".IPO")
    assert model["loss"]["init_args"]["beta"] == 0.3
    assert model["optimizer"]["init_args"]["lr"] == 1e-5
    assert (model["lora"]["r"], model["lora"]["alpha"]) == (4, 8)
    assert (data["max_length"], data["tokens_per_batch"]) == (99, 777)
    trainer = config["trainer"]
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (3, 0.5)
    assert trainer["devices"] == "2"
    logger = trainer["logger"]["init_args"]
    assert (logger["save_dir"], logger["name"]) == ("./here/mine", "")
    assert (config["ckpt_path"], config["seed_everything"]) == ("last", 5)


def test_full_training_and_steps(printed: Callable) -> None:
    config = printed("sft", "--base", "b", "--data", "d", "--full", "--steps", "20")
    assert config["model"]["init_args"]["lora"] is None
    assert config["model"]["init_args"]["dtype"] == "float32"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == pytest.approx(2e-5)
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (-1, 20)


def test_on_a_gpu_the_base_is_bfloat16() -> None:
    arguments = ["--base", "b", "--data", "d"]
    on_gpu = fit_arguments("sft", arguments, gpu=True, base_of=str)
    assert "--trainer.precision=bf16-mixed" in on_gpu
    assert "--model.dtype=bfloat16" in on_gpu
    in_full = fit_arguments("sft", [*arguments, "--full"], gpu=True, base_of=str)
    assert "--model.dtype=float32" in in_full


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base", "b"], "--data: none was given; add --data FILE"),
        (["--data", "d"], "--base: none was given; add --base MODEL"),
        (["--base", "b", "--data", "d", "--bta", "1"], "--bta: no such option; did you mean --bet"),
        (["--base", "b", "--data", "d", "stray"], "stray: is no option; see alignkit dpo --help"),
        (["--base", "b", "--data", "d", "--lr"], "--lr: expected one argument"),
        (["--base", "b", "--data", "d", "--rank", "x"], "--rank x: give a whole number"),
        (["--base", "b", "--data", "d", "--full", "--rank", "4"], "leave out it or --rank"),
        (["--base", "b", "--data", "d", "--full", "--model.lora.r=4"], "or --model.lora.r"),
        (["--base", "b", "--data", "d", "--out", ""], "--out: is empty; give a path"),
        (["--base", "b", "--data", "d", "--lr", "fast"], "model.optimizer"),
        (["--base", "b", "--data", "d", "--loss", "IPOO"], "did you mean IPO?"),
        (["--base", "b", "--data", "d", "--trainer.max_epoch", "3"], "mean trainer.max_epochs?"),
        (["--base", "b", "--data", "d", "--data.max_lenght", "3"], "did you mean max_length?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(alignkit: Callable, arguments: list[str], told: str) -> None:
    status, _, err = alignkit("dpo", *arguments)
    assert status == 2
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_short(stage: str, alignkit: Callable) -> None:
    status, out, _ = alignkit(stage, "--help")
    assert status == 0
    assert out.strip() == stage_help(stage)
    assert len(out.splitlines()) < 50
    for flag in (
        "--base",
        "--data",
        "--lr",
        "--epochs",
        "--rank",
        "--out",
        "--resume",
        "--init-from",
    ):
        assert f" {flag}" in out
    assert ("--beta" in out) is (stage == "dpo")
    told = " ".join(out.split())
    assert "with --full 5e-06" in told if stage == "dpo" else "with --full 2e-05" in told
    assert ("default: the loss's own" in told) is (stage == "dpo")


def test_two_stages_in_turn(
    alignkit: Callable, model_dir: Callable, hh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SFT, then DPO from it without saying the base again, then its resumption."""
    quick = ("--data", hh, "--tokens-per-batch", 512, "--trainer.limit_train_batches", 2)
    status, out, err = alignkit("sft", "--base", model_dir("llama"), *quick)
    assert status == 0, err
    assert "wrote runs/sft/version_0: last.ckpt, best.ckpt, config.yaml" in out
    status, out, err = alignkit("dpo", "--init-from", "runs/sft", *quick, "--beta", 0.2)
    assert status == 0, err
    assert len([line for line in caplog.messages if line.startswith("runs/sft: taking")]) == 1
    config = yaml.safe_load(Path("runs/dpo/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["base"] == str(model_dir("llama"))
    assert config["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.2
    again = ("--resume", "--epochs", 2)
    status, out, err = alignkit("dpo", "--init-from", "runs/sft", *quick, "--beta", 0.2, *again)
    assert status == 0, err
    assert "step 4/4" in out
    assert "step 1/4" not in out


def test_full_beats_a_configuration(printed: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {init_args: {lora: {r: 8}}}\n")
    config = printed(
        "sft", "--base", "b", "--data", "d", "--full", "--config", tmp_path / "mine.yaml"
    )
    assert config["model"]["init_args"]["lora"] is None


@pytest.mark.parametrize("stage", ["lora", "dpo"])
def test_a_configuration_of_another_stage_is_refused(
    stage: str, alignkit: Callable, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {class_path: alignkit.SFTModule}\n")
    status, _, err = alignkit(stage, "--base", "b", "--data", "d", "-c", tmp_path / "mine.yaml")
    assert status == 2
    assert f"{stage}: the configuration trains by SFTModule" in err
    assert err.rstrip().endswith("run it by alignkit sft")


@pytest.mark.parametrize(
    "logger",
    [
        "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: x, name: y}}",
        "[lightning.pytorch.loggers.CSVLogger]",
        "true",
        "null",
    ],
)
def test_out_beats_a_configuration(printed: Callable, tmp_path: Path, logger: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"trainer: {{logger: {logger}}}\n")
    config = printed(
        "sft", "--base", "b", "--data", "d", "--out", "z", "--config", tmp_path / "mine.yaml"
    )
    found = config["trainer"]["logger"]
    assert found["class_path"].endswith("CSVLogger" if "y}" in logger else "TensorBoardLogger")
    assert (found["init_args"]["save_dir"], found["init_args"]["name"]) == ("./z", "")


@pytest.mark.parametrize("out", ["2024", "1e3", "null", "a: b", "[v2] x", "ü/é", "~/x"])
def test_any_folder_is_taken_as_it_is(out: str, printed: Callable) -> None:
    config = printed("sft", "--base", "b", "--data", "d", "--out", out)
    logger = config["trainer"]["logger"]["init_args"]
    assert Path(logger["save_dir"]) == Path(out).expanduser()
    assert logger["name"] == ""


def test_without_a_logger_checkpoints_go_to_out(
    alignkit: Callable, model_dir: Callable, hh: Path
) -> None:
    arguments = ("sft", "--base", model_dir("llama"), "--data", hh, "--steps", 1, "--out", "here")
    status, out, err = alignkit(*arguments, "--trainer.logger", "false")
    assert status == 0, err
    assert "wrote here/checkpoints/version_0: last.ckpt, best.ckpt" in out
    assert "could not find the monitored key" not in err
    assert not Path("runs").exists()
    status, out, err = alignkit(*arguments, "--trainer.fast_dev_run", "true")
    assert status == 0, err
    assert "wrote no checkpoint" in out


def test_checkpoints_at_a_url_are_told(alignkit: Callable, model_dir: Callable, hh: Path) -> None:
    place = "memory://told"
    arguments = ("sft", "--base", model_dir("llama"), "--data", hh, "--steps", 1, "--out", "here")
    saver = ("ModelCheckpoint", "--trainer.callbacks.dirpath", place)
    status, out, err = alignkit(*arguments, "--trainer.callbacks", *saver)
    assert status == 0, err
    wrote = [line for line in out.splitlines() if line.startswith("wrote ")]
    assert wrote == ["wrote here/version_0: config.yaml", f"wrote {place}/epoch=0-step=1.ckpt"]
    assert "next:" not in out  # no command of ours loads weights from there


def test_a_run_that_fails_leaves_no_folder(
    alignkit: Callable, model_dir: Callable, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"what": "nothing"}\n')
    status, _, err = alignkit(
        "sft", "--base", model_dir("llama"), "--data", tmp_path / "bad.jsonl", "--out", "a/b"
    )
    assert status == 2, err
    assert "bad.jsonl:1" in err
    assert not Path("a/b").exists()


def test_a_finished_run_has_nothing_left(alignkit: Callable, model_dir: Callable, hh: Path) -> None:
    arguments = ("sft", "--base", model_dir("llama"), "--data", hh, "--tokens-per-batch", 2048)
    assert alignkit(*arguments)[0] == 0
    status, out, err = alignkit(*arguments, "--resume")
    assert status == 0, err
    assert "nothing was left to train: the run is at step 2 already" in out
    assert "best.ckpt" not in out  # which is the first run's
    assert "next:" not in out
