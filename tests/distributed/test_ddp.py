"""Two gloo ranks against one process: the same parameters, the same logged means."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from alignkit.engine import Example, PackedBatch, collate
from alignkit.modules import DPOModule, KTOModule, SFTModule
from alignkit.objectives.preference import AOT, DPO
from alignkit.objectives.unpaired import KTO
from tests.modules.helpers import answers, loader, pairs, plain_cross_entropy_steps, sgd, trainer


class UnevenBatches(torch.utils.data.IterableDataset[PackedBatch]):
    """Rank 0 gets one example a batch, rank 1 three: unequal weights on purpose."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples) // 4

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for start in range(0, len(self.examples), 4):
            mine = self.examples[start : start + 1] if rank == 0 else None
            yield collate(mine or self.examples[start + 1 : start + 4])


class Uneven(L.LightningDataModule):
    """Uneven batches whose loader, as our data modules' do, leaves the stream of dropout alone."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__()
        self.examples = examples

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        batches = UnevenBatches(self.examples)
        return torch.utils.data.DataLoader(batches, batch_size=None, generator=torch.Generator())


class Save(L.Callback):
    """Write what rank 0 ends with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            metrics = {k: v.clone() for k, v in trainer.callback_metrics.items()}
            torch.save({"state": pl_module.state_dict(), "metrics": metrics}, self.path)


def run(module: L.LightningModule, examples: list[Example], directory: Path, accumulate: int):
    """Train on two spawned ranks and return rank 0's parameters and metrics."""
    batches = torch.utils.data.DataLoader(UnevenBatches(examples), batch_size=None)
    saver = Save(directory / "end.pt")
    trainer(
        directory,
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[saver],
    ).fit(module, batches, batches)
    return torch.load(saver.path, weights_only=True)


def test_gradients_of_two_uneven_ranks_equal_one_big_batch(
    model_dir: Callable, tmp_path: Path
) -> None:
    """Six global batches in windows of four and two, 1 + 3 examples on the ranks."""
    base = str(model_dir("gpt2"))
    module = SFTModule(base, optimizer=sgd, schedule="constant_with_warmup")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    plain = copy.deepcopy(module.model).train()
    examples = answers(24)
    losses = plain_cross_entropy_steps(plain, [examples[:16], examples[16:]])
    end = run(module, examples, tmp_path, accumulate=4)
    expected = dict(plain.named_parameters())
    for name, value in end["state"].items():
        expected_value = expected[name.removeprefix("model.")]
        torch.testing.assert_close(value, expected_value, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(end["metrics"]["train/loss"].item(), losses[-1], rtol=1e-5, atol=0)
    assert end["metrics"]["val/perplexity"] > 1


def test_a_module_with_its_own_optimizer_reaches_spawned_ranks(model_dir: Callable) -> None:
    """They get it by pickle, to which a function of no name is nothing."""
    module = SFTModule(str(model_dir("gpt2")))
    again = pickle.loads(pickle.dumps(module))
    assert again.optimizer is module.optimizer
    (group,) = again.optimizer(again.parameters()).param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.0)


def test_dpo_reference_stays_out_of_ddp(model_dir: Callable, tmp_path: Path) -> None:
    """Ranks agree with a single process, and validation means run over all pairs of all ranks."""
    base = str(model_dir("llama"))
    lora = {"targets": ["q_proj", "v_proj"]}
    torch.manual_seed(3)
    module = DPOModule(
        base, lora=lora, optimizer=sgd, schedule="constant_with_warmup", loss=DPO(beta=1.0)
    )
    single = copy.deepcopy(module)
    examples = pairs(8)
    end = run(module, examples, tmp_path, accumulate=1)
    batches = loader(examples, 4)
    run_single = trainer(tmp_path, max_epochs=1)
    run_single.fit(single, batches, batches)
    assert not any("reference" in name for name in end["state"])
    for name, value in single.state_dict().items():
        torch.testing.assert_close(end["state"][name], value, atol=2e-6, rtol=1e-4)
    gauges = ("val/rewards/accuracies", "val/accuracy_se", "val/kl", "val/displacement")
    gauges += ("val/reward_length_correlation", "val/calibration_error")
    for name in ("val/loss", "val/rewards/margins", "train/loss", "val/logps/chosen", *gauges):
        torch.testing.assert_close(
            end["metrics"][name], run_single.callback_metrics[name], atol=1e-5, rtol=1e-5
        )


def test_the_reference_point_of_kto_is_that_of_all_ranks(
    model_dir: Callable, tmp_path: Path
) -> None:
    """Two ranks with one and three rows, two micro-batches a step, as one process with eight."""
    torch.manual_seed(3)
    module = KTOModule(
        str(model_dir("gpt2")), optimizer=sgd, schedule="constant_with_warmup", loss=KTO(beta=1.0)
    )
    single = copy.deepcopy(module)
    rows = [Example(p.prompt, p.responses, label=i % 3 > 0) for i, p in enumerate(pairs(12))]
    end = run(module, rows, tmp_path, accumulate=2)
    run_single = trainer(tmp_path, max_epochs=1)
    run_single.fit(single, loader(rows, 8), loader(rows, 4))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(end["state"][name], value, atol=2e-6, rtol=1e-4)
    logged = run_single.callback_metrics
    for name in ("train/loss", "train/kl", "train/rewards/margins", "val/loss", "val/kl"):
        torch.testing.assert_close(end["metrics"][name], logged[name], atol=1e-5, rtol=1e-5)


def test_aot_sorts_the_pairs_of_all_ranks_and_micro_batches(
    model_dir: Callable, tmp_path: Path
) -> None:
    """Two ranks with one and three pairs, two micro-batches a step, as one process with eight."""
    torch.manual_seed(3)
    options = {"optimizer": sgd, "schedule": "constant_with_warmup", "loss": AOT(beta=1.0)}
    module = DPOModule(str(model_dir("gpt2")), **options)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    module.reference._agreed = True
    single = copy.deepcopy(module)
    # Of one length, so that policy and reference order their margins differently.
    examples = [Example(e.prompt, [(e.responses[k] * 9)[:9] for k in (0, 1)]) for e in pairs(16)]
    end = run(module, examples, tmp_path, accumulate=2)
    run_single = trainer(tmp_path, max_epochs=1)
    run_single.fit(single, loader(examples, 8))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(end["state"][name], value, atol=5e-5, rtol=1e-3)
    loss = run_single.callback_metrics["train/loss"]
    torch.testing.assert_close(end["metrics"]["train/loss"], loss, atol=1e-5, rtol=1e-5)


def test_dropout_resumes_exactly_on_every_rank(
    model_dir: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps in one go, or the last two from the second's checkpoint, after an epoch's end."""
    base = str(model_dir("gpt2"))
    lora = {"dropout": 0.5}

    def fit(directory: Path, resume: Path | None) -> dict[str, torch.Tensor]:
        monkeypatch.delenv("MASTER_PORT", raising=False)  # each run draws a port of its own
        torch.manual_seed(3 if resume is None else 99)
        module = SFTModule(base, lora=lora, optimizer=sgd, schedule="constant_with_warmup")
        saver = ModelCheckpoint(directory, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(
            directory,
            devices=2,
            strategy="ddp_spawn",
            max_steps=4,
            callbacks=[saver],
            enable_checkpointing=True,
        ).fit(module, datamodule=Uneven(answers(8)), ckpt_path=resume, weights_only=True)
        state = torch.load(directory / "step=4.ckpt", weights_only=True)["state_dict"]
        return dict(state)

    whole = fit(tmp_path / "whole", resume=None)
    resumed = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "step=2.ckpt")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
