"""A NaN stops the run before it reaches the weights, or is left out, and names its rows."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from alignkit import AlignkitError, HHSFTDataModule, LossOutput, OpenWebTextDataModule
from alignkit.callbacks import Checkpoint
from alignkit.cli import main
from alignkit.engine import PackedBatch
from alignkit.models.checkpoint import read_checkpoint
from alignkit.modules import DPOModule, SFTModule
from alignkit.modules.nonfinite import MOST_SKIPPED_IN_A_ROW, load_batch
from tests.modules.helpers import answers, loader, logged_steps, pairs, sgd, trainer

POISON = "~"


class Poisoned(SFTModule):
    """A batch with the poison in it has a loss of NaN, or a gradient of NaN under a sound loss."""

    poison = "loss"
    token: int | None = None

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        output = super().compute_loss(batch)
        token = self.token or _poison_id(self.hparams["base"])
        if not (batch.input_ids == token).any():
            return output
        weight = next(p for p in self.model.parameters() if p.requires_grad).sum()
        # √|w - w| is 0, and its gradient 0 · ∞.
        nothing = (weight - weight.detach()).abs().sqrt()
        factor = float("nan") if self.poison == "loss" else 1.0
        loss: Tensor = output.loss_sum * factor + nothing
        return LossOutput(loss, output.weight, output.metrics)


class PoisonedGradient(Poisoned):
    """Only its gradient is not finite."""

    poison = "gradient"


@lru_cache
def _poison_id(base: str) -> int:
    from alignkit.models import load_tokenizer

    return int(load_tokenizer(base).convert_tokens_to_ids(POISON))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty answers, one of them, on line 23, with poison."""
    home = tmp_path / "data"
    home.mkdir()
    for split, count in (("train", 40), ("test", 3)):
        lines = []
        for i in range(count):
            prompt = f"\n\nHuman: What is {i}?\n\nAssistant:"
            poison = POISON if (split, i) == ("train", 22) else ""
            lines.append(
                {"chosen": f"{prompt} The number {i}{poison}.", "rejected": f"{prompt} No."}
            )
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return home


def data(base: str, rows: Path, tmp_path: Path) -> HHSFTDataModule:
    return HHSFTDataModule(base, str(rows), examples_per_batch=8, cache_dir=str(tmp_path / "cache"))


def fit(module: L.LightningModule, data: Any, directory: Path, **options: Any) -> L.Trainer:
    keep = Checkpoint(dirpath=directory, save_last=True, enable_version_counter=False)
    settings = {"max_epochs": 1, "accumulate_grad_batches": 2, "val_check_interval": 2, **options}
    run = trainer(directory, callbacks=[keep], enable_checkpointing=True, **settings)
    run.fit(module, datamodule=data, weights_only=True)
    return run


@pytest.mark.parametrize("kind", [Poisoned, PoisonedGradient])
def test_stops_before_the_step_with_the_row_and_the_batch(
    model_dir: Callable[..., Path], rows: Path, tmp_path: Path, kind: type[Poisoned]
) -> None:
    base = str(model_dir("gpt2"))
    module = kind(base)
    logged = logged_steps(module)
    with pytest.raises(AlignkitError) as caught:
        fit(module, data(base, rows, tmp_path), tmp_path / "run")
    message = str(caught.value)
    taken = len(logged["train/loss"])
    assert f"global step {taken}: the " in message
    assert f"; {rows / 'train.jsonl'}:23; the batch is kept in " in message
    assert "\n" not in message
    file = tmp_path / "run" / f"nonfinite-step{taken}-rank0.pt"
    assert str(file) in message
    assert all(parameter.isfinite().all() for parameter in module.model.parameters())

    kept = torch.load(file, weights_only=True)
    assert f"{rows / 'train.jsonl'}:23" in kept["rows"]
    batch = load_batch(file)
    assert len(kept["rows"]) == batch.num_examples
    loss = module.compute_loss(batch).loss_sum
    gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    assert loss.isnan() if kind is Poisoned else not all(g.isfinite().all() for g in gradients)


def test_the_last_checkpoint_stays_good(
    model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """It is finite, and a run that skips goes on from it."""
    base = str(model_dir("gpt2"))
    with pytest.raises(AlignkitError):
        fit(Poisoned(base), data(base, rows, tmp_path), tmp_path / "run")
    last = tmp_path / "run" / "last.ckpt"
    before = read_checkpoint(last)
    assert all(value.isfinite().all() for value in before["state_dict"].values())
    module = Poisoned(base, on_nonfinite="skip")
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    run.fit(module, datamodule=data(base, rows, tmp_path), ckpt_path=last, weights_only=True)
    assert run.global_step == 5
    assert module.guard.skipped == 1


def test_through_the_command(
    model_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = model_dir("gpt2")
    arguments = [
        "fit", "--model", "tests.modules.test_nonfinite.Poisoned", f"--model.base={base}",
        "--data=alignkit.HHSFTDataModule", f"--data.path={rows}", "--data.examples_per_batch=8",
        f"--data.cache_dir={tmp_path / 'cache'}", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("alignkit: error: global step ")
    assert f"{rows / 'train.jsonl'}:23" in error
    assert not list(tmp_path.rglob("last.ckpt"))
    kept = list(tmp_path.rglob("nonfinite-*.pt"))
    assert len(kept) == 1
    assert str(kept[0]) in error
    assert main([*arguments, "--model.on_nonfinite=skip", "--trainer.logger=false"]) == 0


def test_skipping_leaves_everything_as_it_was(
    model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows of two; the second holds the poison. AdamW has then taken two steps of three."""
    base = str(model_dir("gpt2"))
    token = _poison_id(base)
    examples = [e for e in answers(40) if token not in [*e.prompt, *e.responses[0]]][:12]
    poisoned = copy.deepcopy(examples)
    poisoned[5].responses[0].append(token)  # type: ignore[attr-defined]
    results = []
    for batches in (examples[:4] + examples[8:], poisoned):
        torch.manual_seed(0)
        module = Poisoned(base, schedule="constant_with_warmup", on_nonfinite="skip")
        logged = logged_steps(module)
        run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
        with caplog.at_level(logging.WARNING, "alignkit"):
            run.fit(module, loader(batches, 2))
        state = run.optimizers[0].state_dict()["state"]
        results.append((module.state_dict(), state, logged, run))
    (expected, moments, logged, _), (actual, others, skipped, run) = results
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for number, own in moments.items():
        assert all(torch.equal(others[number][name], own[name]) for name in own)
    assert skipped["train/loss"] == logged["train/loss"]
    assert skipped["train/skipped_steps"] == [1, 1]
    assert len(skipped["train/lr"]) == 3  # the schedule moves on over it
    assert run.global_step == 3
    (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert line.startswith(
        "global step 1: the loss is nan; example 1 of micro-batch 2 of the epoch"
    )


def test_epoch_means_leave_skipped_steps_out(
    model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = str(model_dir("gpt2"))
    run = fit(Poisoned(base, on_nonfinite="skip"), data(base, rows, tmp_path), tmp_path / "run")
    assert run.callback_metrics["train/loss_epoch"].isfinite()
    assert run.callback_metrics["train/skipped_steps"] == 1
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["skipped_steps"] == 1


def test_nothing_but_skipped_steps_is_no_training(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights that are NaN skip every step that follows."""
    module = SFTModule(str(model_dir("gpt2")), on_nonfinite="skip")
    with torch.no_grad():
        module.model.transformer.ln_f.weight.fill_(float("nan"))
    batches = loader(answers(MOST_SKIPPED_IN_A_ROW + 5), 1)
    with pytest.raises(AlignkitError, match=f"{MOST_SKIPPED_IN_A_ROW} steps in a row"):
        trainer(tmp_path, max_epochs=1).fit(module, batches)


def test_dpo_names_the_pair_at_its_first_step_too(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """NaN is no difference between policy and reference; the gate leaves it to the step's check."""

    class PoisonedPairs(DPOModule):
        def preference_loss(self, policy: Any, reference: Any) -> Tensor:
            return super().preference_loss(policy, reference) * float("nan")

    module = PoisonedPairs(str(model_dir("gpt2")))
    with pytest.raises(AlignkitError, match="global step 0: the loss is nan; example 0 of micro"):
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 1))


def test_a_stream_knows_its_rows(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [{"text": f"row {i} {POISON if i == 11 else ''}" * 4} for i in range(30)]
    text.write_text("\n".join(map(json.dumps, lines)))
    base = str(model_dir("gpt2"))
    stream = OpenWebTextDataModule(
        base, str(text), streaming=True, held_out=2, block_size=16, tokens_per_batch=32,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    run = trainer(tmp_path, max_steps=40, max_epochs=-1)
    # A packed row has the line of its first document.
    with pytest.raises(AlignkitError, match=rf"{text}:1[012](, \S+:1[012])*; the batch"):
        run.fit(Poisoned(base), datamodule=stream)


def test_no_checkpoint_holds_what_is_not_finite(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """A step of a finite gradient can still throw a weight out of range, the last one too."""
    module = SFTModule(
        str(model_dir("gpt2")),
        lora={"alpha": 10**6},
        optimizer=lambda p: torch.optim.SGD(p, lr=3e38),
        schedule="constant_with_warmup",
    )
    saver = ModelCheckpoint(tmp_path / "run", save_last=True, every_n_train_steps=1)
    run = trainer(tmp_path, max_steps=1, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(AlignkitError, match=r"global step 1: model\..*lora_. is not finite, so no"):
        run.fit(module, loader(answers(2), 2))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_validation_that_is_not_finite_is_told(
    model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no reason to stop: that is EarlyStopping's to decide."""

    class NaNInValidation(SFTModule):
        def compute_loss(self, batch: PackedBatch) -> LossOutput:
            output = super().compute_loss(batch)
            factor = 1.0 if self.training else float("nan")
            return LossOutput(output.loss_sum * factor, output.weight, {})

    with caplog.at_level(logging.WARNING, "alignkit"):
        trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(
            NaNInValidation(str(model_dir("gpt2"))), loader(answers(2), 1), loader(answers(2), 2)
        )
    assert [r.getMessage() for r in caplog.records] == ["global step 2: val/loss is nan"]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_gradient_scaler_deals_with_overflow_itself(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Its first scale is far too large: it leaves steps out and halves it, as it should."""
    module = SFTModule(str(model_dir("gpt2")), optimizer=sgd, schedule="constant_with_warmup")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    run = trainer(tmp_path, max_steps=2, plugins=[plugin])
    run.fit(module, loader(answers(4), 2))
    assert scaler.get_scale() < 1e38
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_unknown_policy_is_refused(model_dir: Callable[..., Path]) -> None:
    with pytest.raises(AlignkitError, match="choose stop or skip"):
        SFTModule(str(model_dir("gpt2")), on_nonfinite="ignore")
