"""TRL's trainers, fed the job's very batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from alignkit.engine import Example
from sidebyside.arm_huggingface import InTurns, shared_arguments
from sidebyside.job import BETA, Job


class DPOInTurns(InTurns, DPOTrainer):
    """TRL's DPO. A PEFT model's reference is a copy of its adapter, as alignkit's is."""

    losses_add_up = False

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # token ids already, and the same ones in every arm

    def response_logps(self, batch: dict[str, Any]) -> list[float]:
        # Before the first step, the reference that is scored here is the policy.
        return torch.cat(self.compute_ref_log_probs(self.model, batch)).tolist()  # type: ignore[no-any-return]


class SFTInTurns(InTurns, SFTTrainer):
    """TRL's SFT; a data set that holds token ids and labels passes its preparation unchanged."""


def dpo_trainer(
    job: Job,
    examples: Sequence[Example],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
    held_out: Sequence[Example] = (),
    **options: Any,
) -> InTurns:
    """TRL's DPOTrainer with its defaults, but for what all arms share and ``options``."""

    def rows(pairs: Sequence[Example]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "prompt_ids": list(example.prompt),
                    "chosen_ids": list(example.responses[0]),
                    "rejected_ids": list(example.responses[1]),
                }
                for example in pairs
            ]
        )

    return DPOInTurns(
        model,
        args=DPOConfig(beta=BETA, max_length=None, **shared_arguments(job, directory), **options),
        train_dataset=rows(examples),
        eval_dataset=rows(held_out) if held_out else None,
        processing_class=tokenizer,
    )


def sft_trainer(
    job: Job,
    examples: Sequence[Example],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
) -> InTurns:
    """TRL's SFTTrainer with its defaults, but for what all arms share."""
    rows = [
        {
            "input_ids": [*example.prompt, *example.responses[0]],
            "labels": [-100] * len(example.prompt) + list(example.responses[0]),
        }
        for example in examples
    ]
    options = shared_arguments(job, directory) | {"padding_free": job.arm.padding_free}
    return SFTInTurns(
        model,
        args=SFTConfig(max_length=None, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


MAKERS: dict[str, Callable[..., InTurns]] = {"dpo": dpo_trainer, "sft": sft_trainer}
