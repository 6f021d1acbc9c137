"""The peers' arms: transformers' trainer with PEFT, or TRL's trainers, fed the job's very batches.

Nothing is reimplemented. `InTurns` overrides only where a batch comes from, keeps the loss that
the trainer computes, and ties the loop to the turnstile; everything else is the library's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from alignkit.engine import Example
from sidebyside.job import CLIP_NORM, LEARNING_RATE, Job
from sidebyside.turnstile import Turnstile

IGNORED = -100
"""Label of a token without loss."""


def train(job: Job, examples: Sequence[Example], turnstile: Turnstile) -> None:
    """Run the job's steps, each when the turnstile lets it."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        trainer = maker(job)(job, examples, build(job), tokenizer, directory)
        trainer.take_turns(job, turnstile)
        trainer.train()


def maker(job: Job) -> Callable[..., InTurns]:
    """What makes the job's trainer; only TRL's need trl and datasets."""
    if job.arm.package == "peft":
        return lm_trainer
    from sidebyside.arm_trl import MAKERS

    return MAKERS[job.task]


def build(job: Job) -> PeftModel:
    """The base with the job's adapter, trainable; PEFT keeps adapters in fp32 over a bf16 base."""
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.arm.dtype))
    without_dropout(base)
    return PeftModel.from_pretrained(base, job.adapter, is_trainable=True)


def without_dropout(model: PreTrainedModel) -> None:
    """Switch off the base's dropout, as alignkit and TRL's DPO do and TRL's SFT does not."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class InTurns(Trainer):
    """Any trainer on the job's batches, one optimizer step at a time."""

    losses_add_up = True
    """Whether micro-batch losses add up to the step's; otherwise they are averaged."""

    def take_turns(self, job: Job, turnstile: Turnstile) -> None:
        """Set what the trainer's loop follows."""
        self.job, self.turnstile = job, turnstile
        self.parts: list[Tensor] = []
        self.add_callback(Turns(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The job's steps, cut in order into micro-batches."""
        count = self.job.micro_batches
        batches = [
            list(part.tolist())
            for step in self.job.steps
            for part in torch.tensor(step).tensor_split(count)
        ]
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.job.device == "cuda",
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the loss of each micro-batch."""
        loss = super().compute_loss(*args, **kwargs)
        self.parts.append(loss.detach())
        return loss

    def note_loss(self) -> None:
        """Hand the loss of the step that has just ended to the turnstile."""
        if self.parts:
            parts = torch.stack(self.parts)
            self.turnstile.losses.append(parts.sum() if self.losses_add_up else parts.mean())
            self.parts.clear()

    def logps(self, index: int) -> list[float]:
        """log π(y|x) of one example's responses under the policy."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[index]]))
        with torch.no_grad(), self.accelerator.autocast():
            return self.response_logps(batch)

    def response_logps(self, batch: dict[str, Any]) -> list[float]:
        """Score a collated example by the path that training takes."""
        return [float(self.model(**batch, fused_lm_head=True).log_probs.sum())]


class Turns(TrainerCallback):
    """Ties the trainer's loop to the turnstile."""

    def __init__(self, trainer: InTurns) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.turnstile.loaded()
        trainer.turnstile.ready([p for i in trainer.job.scored for p in trainer.logps(i)])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.note_loss()
        self._trainer.turnstile.gate()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any
    ) -> None:
        if state.global_step == state.max_steps:
            self._trainer.note_loss()
            self._trainer.turnstile.finish()


class LMInTurns(InTurns):
    """Language modelling and SFT as PEFT's users do them, in transformers' own trainer."""

    def response_logps(self, batch: dict[str, Any]) -> list[float]:
        logp_LV = self.model(input_ids=batch["input_ids"]).logits[0, :-1].float().log_softmax(-1)
        logp_L = logp_LV.gather(1, batch["input_ids"][0, 1:, None])[:, 0]
        return [float(logp_L[batch["labels"][0, 1:] != IGNORED].sum())]


def lm_trainer(
    job: Job,
    examples: Sequence[Example],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
) -> InTurns:
    """transformers' Trainer with its defaults, but for what all arms share."""
    rows = [
        {
            "input_ids": [*example.prompt, *example.responses[0]],
            # Nothing predicts a row's first token, yet the Trainer would divide the loss by it.
            "labels": ([IGNORED] * len(example.prompt) or [IGNORED])
            + list(example.responses[0][0 if example.prompt else 1 :]),
        }
        for example in examples
    ]

    def collator(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        labels = [torch.tensor(row["labels"]) for row in batch]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return LMInTurns(
        model,
        args=TrainingArguments(remove_unused_columns=False, **shared_arguments(job, directory)),
        train_dataset=rows,  # a list is a map-style data set
        data_collator=collator,
    )


def shared_arguments(job: Job, directory: str) -> dict[str, Any]:
    """What every arm trains with: steps, optimizer, precision, and no files written."""
    return {
        "output_dir": directory,
        "max_steps": len(job.steps),
        "per_device_train_batch_size": max(1, len(job.steps[-1]) // job.micro_batches),
        "gradient_accumulation_steps": job.micro_batches,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP_NORM,
        "bf16": job.arm.mixed,
        "gradient_checkpointing": job.arm.checkpointing,
        "use_cpu": job.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
