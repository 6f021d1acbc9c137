"""alignkit's arm: the modules a user trains with, in Lightning's Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import AdamW
from torch.utils.data import DataLoader

from alignkit import AlignmentModule, DPOModule, LoRAModule, SFTModule
from alignkit.data.deal.samplers import TokenBudgetBatchSampler
from alignkit.engine import Example, PackedBatch, collate, response_sums, score
from alignkit.lora import LoRAConfig
from alignkit.objectives.preference import DPO
from sidebyside.job import BETA, CLIP_NORM, LEARNING_RATE, Job
from sidebyside.turnstile import Turnstile


def train(job: Job, examples: Sequence[Example], turnstile: Turnstile) -> None:
    """Run the job's steps, each when the turnstile lets it."""
    # Worker processes would compete with the two cores that train; collating takes milliseconds.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    loader: DataLoader[PackedBatch] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list is a map-style data set
        batch_sampler=list(micro_batches(job, examples)),
        collate_fn=collate,
        pin_memory=job.device == "cuda",
    )
    trainer = Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if job.arm.mixed else "32-true",
        max_steps=len(job.steps),
        accumulate_grad_batches=job.micro_batches,
        gradient_clip_val=CLIP_NORM,
        callbacks=[Turns(job, examples, turnstile)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(job), loader)


def build(job: Job) -> AlignmentModule:
    """The task's module, its adapter loaded."""
    adapters = job.arm.adapters
    dtype: Literal["float32", "bfloat16"] = job.arm.dtype
    options: dict[str, Any] = {
        "lora": LoRAConfig.from_dict(job.lora) if adapters else None,
        "init_from": job.adapter if adapters else None,
        "dtype": dtype,
        "optimizer": partial(AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        "schedule": "constant_with_warmup",
        "activation_checkpointing": job.arm.checkpointing,
    }
    if job.task == "dpo":
        return DPOModule(job.model, loss=DPO(beta=BETA), **options)
    return (SFTModule if job.task == "sft" else LoRAModule)(job.model, **options)


def micro_batches(job: Job, examples: Sequence[Example]) -> Iterator[list[int]]:
    """Each step's examples, dealt to its micro-batches as alignkit's data modules deal them."""
    for step in job.steps:
        lengths = [examples[index].num_tokens for index in step]
        sampler = TokenBudgetBatchSampler(
            lengths,
            max(sum(lengths), 1),
            examples_per_batch=len(step),
            shuffle=False,
            accumulate=job.micro_batches,
        )
        for members in sampler:
            yield [step[member] for member in members]


class Turns(Callback):
    """Ties Lightning's loop to the turnstile."""

    def __init__(self, job: Job, examples: Sequence[Example], turnstile: Turnstile) -> None:
        self._job, self._examples, self._turnstile = job, examples, turnstile

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._turnstile.loaded()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logps = [
                logp
                for index in self._job.scored
                for logp in self._logps(pl_module, self._examples[index])
            ]
        self._turnstile.ready(logps)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        if batch_idx % self._job.micro_batches == 0:
            self._note_loss(trainer)
            self._turnstile.gate()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            self._note_loss(trainer)
            self._turnstile.finish()

    def _note_loss(self, trainer: Trainer) -> None:
        if trainer.global_step:
            self._turnstile.losses.append(trainer.callback_metrics["train/loss"].detach().clone())

    def _logps(self, module: LightningModule, example: Example) -> list[float]:
        batch = collate([example]).to(module.device)
        sums: list[float] = response_sums(score(module.model, batch), batch).tolist()  # type: ignore[arg-type]
        return sums
