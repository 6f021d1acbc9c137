"""Every shipped configuration, through the real command line, on tiny models and data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkit.models.checkpoint import read_checkpoint
from alignkit.objectives.preference import (
    DPO,
    IPO,
    LDDPO,
    WPO,
    ChosenNLL,
    PlackettLuce,
    PreferenceLoss,
    WeightedSum,
)
from alignkit.tools.curves import read_scalars

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILY = {"lora": "gpt2", "sft": "gpt_neox", "dpo": "gpt_neox"}
DEMO = {"lora": "llama", "sft": "llama", "dpo": "llama"}
ALL = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


def stage_of(config: str) -> str:
    return Path(config).stem.split("_")[0]


def quick(config: str, model_dir: Callable, hh: Path, text: Path, steps: int = 3) -> list[object]:
    """Arguments that shrink a shipped configuration to seconds."""
    stage = stage_of(config)
    family = (DEMO if config.startswith("demo") else FAMILY)[stage]
    lengths = ["--data.block_size", 128] if stage == "lora" else ["--data.max_length", 128]
    return [
        "fit", "--config", CONFIGS / config,
        "--model.base", model_dir(family),
        "--data.path", text if stage == "lora" else hh,
        *lengths,
        "--data.num_workers", 0,
        "--data.tokens_per_batch", 512,
        "--trainer.accelerator", "cpu",
        "--trainer.devices", 1,
        "--trainer.max_steps", steps,
        "--trainer.val_check_interval", 1,
        "--trainer.log_every_n_steps", 1,
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


def test_there_is_a_config_for_every_stage() -> None:
    names = {"lora_owt_gpt2.yaml", "sft_hh_pythia.yaml", "dpo_hh_pythia.yaml"}
    assert names | {f"demo/{s}.yaml" for s in FAMILY} <= set(ALL)


@pytest.mark.parametrize("config", ALL)
def test_every_config_trains_logs_and_saves(
    config: str, alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    status, _, err = alignkit(*quick(config, model_dir, hh, text))
    assert status == 0, err
    settings = yaml.safe_load((CONFIGS / config).read_text())
    logger = settings["trainer"]["logger"]["init_args"]
    (run,) = Path(logger["save_dir"], logger["name"]).glob("version_*")
    assert {"last.ckpt", "config.yaml"} <= {path.name for path in run.iterdir()}
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all("lora_" in name for name in checkpoint["state_dict"])

    tags = read_scalars(run)
    wanted = ["train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "val/loss"]
    assert {tag.partition("/")[0] for tag in tags} == {"loss", "train", "val"}  # losses come first
    named = {tag.rpartition("/")[2]: tags[tag] for tag in tags if tag.startswith("loss/")}
    assert named == {split: tags[f"{split}/loss"] for split in ("train", "val")}
    if stage_of(config) == "dpo":
        names = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
        names += ["logps/chosen", "logps/rejected"]
        wanted += [f"{split}/{name}" for split in ("train", "val") for name in names]
        assert tags["train/loss"][0][1] == pytest.approx(0.6931, abs=1e-4)
        assert tags["train/rewards/chosen"][0][1] == 0
    else:
        wanted += ["val/perplexity", "val/token_accuracy"]
    assert set(wanted) <= set(tags)
    assert len(tags["train/loss"]) == 3


def resumes_exactly(alignkit: Callable, dpo: list[object]) -> None:
    """Run four steps in one go, and the last two of them from the second's checkpoint."""
    assert alignkit(*dpo)[0] == 0
    whole = read_checkpoint("runs/demo/dpo")["state_dict"]
    keep = "trainer.callbacks.init_args"
    each = [f"--{keep}.every_n_train_steps", 1, f"--{keep}.save_top_k", -1]
    each += [f"--{keep}.filename", "{step}", f"--{keep}.monitor", "null"]
    each += [f"--{keep}.dirpath", "runs/each"]
    assert alignkit(*dpo, *each)[0] == 0
    resume = ["--ckpt_path", "runs/each/step=2.ckpt", f"--{keep}.dirpath", "runs/resumed"]
    status, _, err = alignkit(*dpo, *resume)
    assert status == 0, err
    resumed = read_checkpoint("runs/resumed")["state_dict"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_three_stages_chain_and_resume(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    """LoRA to SFT to DPO by --model.init_from; DPO interrupted at 2 of 4 steps resumes exactly."""
    runs = Path("runs/demo")
    for stage, before in (("lora", None), ("sft", "lora")):
        chain = ["--model.init_from", runs / before] if before else []
        status, _, err = alignkit(*quick(f"demo/{stage}.yaml", model_dir, hh, text), *chain)
        assert status == 0, err
    dpo = [*quick("demo/dpo.yaml", model_dir, hh, text, steps=4)]
    dpo += ["--model.init_from", runs / "sft", "--model.lora.dropout", 0.1]
    dpo += ["--data.tokens_per_batch", 256]
    resumes_exactly(alignkit, dpo)

    validate = ["validate", *dpo[1:], "--ckpt_path", runs / "dpo"]
    status, out, err = alignkit(*validate)
    assert status == 0, err
    assert "val/rewards/accuracies" in out
    status, out, err = alignkit("test", *validate[1:])
    assert status == 0, err
    assert "test/rewards/accuracies" in out


def test_a_new_objective_by_class_path(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's file beside the run: at most 12 lines, its own parameter on the command line."""
    source = '''from dataclasses import dataclass
from torch.nn.functional import logsigmoid
from alignkit.objectives.preference import PreferenceLoss

@dataclass(frozen=True)
class Simple(PreferenceLoss):
    """A margin on mean log-probs, with a target."""
    gamma: float = 0.5
    def __call__(self, policy, reference):
        mean = policy.per_token()
        return -logsigmoid(mean.chosen - mean.rejected - self.gamma)
'''
    assert len(source.splitlines()) <= 12
    Path("objectives_of_mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    arguments = quick("demo/dpo.yaml", model_dir, hh, text)
    mine = ["--model.loss", "objectives_of_mine.Simple", "--model.loss.gamma", 1.5]
    status, _, err = alignkit(*arguments, *mine)
    assert status == 0, err
    checkpoint = read_checkpoint("runs/demo/dpo")
    loss = {"class_path": "objectives_of_mine.Simple", "init_args": {"gamma": 1.5}}
    assert checkpoint["hyper_parameters"]["loss"] == loss
    (run,) = Path("runs/demo/dpo").glob("version_*")
    # -log sigmoid(margin - 1.5) starts near log(1 + e^1.5) = 1.70.
    assert read_scalars(run)["train/loss"][0][1] == pytest.approx(1.70, abs=0.2)


def test_a_weighted_sum_from_the_command_line(
    alignkit: Callable, workplace: Path, model_dir: Callable[[str], Path], hh: Path, text: Path
) -> None:
    """Terms by name or with parameters; the checkpoint brings the same sum back."""
    terms = '[{"class_path": "DPO", "init_args": {"beta": 0.3}}, ChosenNLL]'
    loss = ["--model.loss", "WeightedSum", "--model.loss.terms", terms]
    arguments = quick("demo/dpo.yaml", model_dir, hh, text)
    status, _, err = alignkit(*arguments, *loss, "--model.loss.weights", "[1.0, 0.5]")
    assert status == 0, err
    kept = PreferenceLoss.from_dict(read_checkpoint("runs/demo/dpo")["hyper_parameters"]["loss"])
    assert kept == WeightedSum((DPO(beta=0.3), ChosenNLL()), (1.0, 0.5))
    (run,) = Path("runs/demo/dpo").glob("version_*")
    # ln 2 and half of a random model's cross-entropy
    assert read_scalars(run)["train/loss"][0][1] > log(2) + 1


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["WPO", "--model.loss.of", "IPO"], WPO(IPO())),
        (["WPO"], WPO()),
        (["LDDPO", "--model.loss.alpha", 0.25], LDDPO(alpha=0.25)),
        (["PlackettLuce", "--model.loss.beta", 0.3], PlackettLuce(beta=0.3)),
    ],
    ids=lambda value: str(value),
)
def test_losses_of_tokens_weights_and_ranks_from_the_command_line(
    flags: list,
    kept: PreferenceLoss,
    alignkit: Callable,
    workplace: Path,
    model_dir: Callable[[str], Path],
    hh: Path,
    text: Path,
) -> None:
    arguments = quick("demo/dpo.yaml", model_dir, hh, text)
    if isinstance(kept, PlackettLuce):
        rows = [
            {"prompt": f"Say {n}.", "responses": ["One.", f"{n}.", "No."], "scores": [n, 9.5, -1]}
            for n in range(20)
        ]
        Path("ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += ["--data", "PreferenceDataModule", "--data.path", "ranked.jsonl"]
    status, _, err = alignkit(*arguments, "--model.loss", *flags)
    assert status == 0, err
    stored = read_checkpoint("runs/demo/dpo")["hyper_parameters"]["loss"]
    assert PreferenceLoss.from_dict(stored) == kept
    (run,) = Path("runs/demo/dpo").glob("version_*")
    start = {"PlackettLuce": log(6), "LDDPO": log(2)}.get(type(kept).__name__)
    if start is not None:
        assert read_scalars(run)["train/loss"][0][1] == pytest.approx(start, abs=1e-3)


def test_a_weighted_sum_without_terms_is_refused(alignkit: Callable, workplace: Path) -> None:
    config = ["fit", "--config", CONFIGS / "dpo_hh_pythia.yaml", "--model.loss", "WeightedSum"]
    status, _, err = alignkit(*config)
    assert status == 2
    assert "model.loss.terms of WeightedSum: must name at least one loss" in err
    assert len(err.strip().splitlines()) == 1
    status, _, err = alignkit(*config, "--model.loss.terms", "[NoSuchLoss]")
    assert status == 2
    assert "NoSuchLoss" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flag",
    [
        ["--model.optimizer", "SGD"],
        ["--model.optimizer=SGD"],
        ["--model.optimizer.class_path", "SGD"],
    ],
)
def test_a_short_name_is_pytorchs_optimizer(
    flag: list[str], alignkit: Callable, workplace: Path
) -> None:
    """Whatever else has been imported: bitsandbytes has an SGD too."""

    class SGD(torch.optim.SGD):
        """Of another package."""

    config = ["fit", "--config", CONFIGS / "demo" / "sft.yaml", *flag, "--print_config"]
    status, out, err = alignkit(*config)
    assert status == 0, err
    optimizer = yaml.safe_load(out)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    status, out, err = alignkit("fit", "--model", "SFTModule", "--model.optimizer.help", "SGD")
    assert status == 0, err
    assert "--optimizer.momentum MOMENTUM" in out


@pytest.mark.parametrize("stage", ["dpo.yaml", "sft.yaml"])
def test_a_policy_that_is_lost_ends_with_a_warning(
    stage: str,
    alignkit: Callable,
    model_dir: Callable[[str], Path],
    hh: Path,
    text: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its step was finite, and what came out is not: gauges and histograms have nothing to show."""
    rate = ["--model.optimizer.lr", 1e30]
    status, _, err = alignkit(*quick(f"demo/{stage}", model_dir, hh, text, 1), *rate)
    assert status == 0, err
    assert "val/loss is nan" in caplog.text


def test_print_config_is_a_config(alignkit: Callable, workplace: Path) -> None:
    config = CONFIGS / "dpo_hh_pythia.yaml"
    status, out, _ = alignkit("fit", "--config", config, "--model.loss.beta", 0.3, "--print_config")
    assert status == 0
    printed = yaml.safe_load(out)
    assert printed["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.3
    Path("again.yaml").write_text(out)
    status, again, _ = alignkit("fit", "--config", "again.yaml", "--print_config")
    assert yaml.safe_load(again) == printed


def test_help_names_every_command() -> None:
    """The installed module as a process of its own."""
    shown = subprocess.run(
        [sys.executable, "-m", "alignkit", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("fit", "validate", "test", "generate", "compare", "export", "audit", "profile"):
        assert f"    {name} " in shown


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)
def test_compiled_dpo_is_eager_dpo(
    alignkit: Callable,
    model_dir: Callable,
    hh: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training and validation, policy and live reference, in fp32: the same validation losses."""
    losses = {}
    for compiles in ("false", "true"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        home = workplace / compiles
        home.mkdir()
        monkeypatch.chdir(home)
        status, _, err = alignkit(
            *quick("dpo_hh_pythia.yaml", model_dir, hh, hh),
            "--model.compile", compiles,
            "--model.optimizer.lr", 1e-2,
            "--trainer.precision", "32-true",
        )  # fmt: skip
        assert status == 0, err
        assert "recompile_limit" not in err
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (compiles == "true")
        (events,) = home.rglob("events.out.*")
        reader = EventAccumulator(str(events))
        reader.Reload()
        losses[compiles] = [event.value for event in reader.Scalars("val/loss")]
    torch.compiler.reset()
    assert len(losses["false"]) == 3
    assert losses["false"][-1] != pytest.approx(losses["false"][0], rel=1e-2), "nothing was learnt"
    assert losses["true"] == pytest.approx(losses["false"], rel=5e-3)
