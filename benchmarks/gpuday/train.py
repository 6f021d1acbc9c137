"""A run as users start it: Lightning's Trainer, a data module over a file, against the bare step.

The text is made up, in the lengths of real pairs; a byte-level tokenizer is trained on it. Where
the Trainer's steps take as long as bare ones, loading, logging and the loop keep the device busy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from sidebyside.shapes import SHAPES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignkit import AlignmentModule, HHPreferenceDataModule
from alignkit.engine import PackedBatch
from gpuday import bare
from gpuday.clock import seconds, wait
from gpuday.day import Day
from gpuday.sync import waits

_WORDS = 2000
_SEEN = 8
"""Batches that the bare step goes over, of those that the Trainer took."""


def measure(day: Day) -> None:
    """Time both, shape by shape, and count what the Trainer's steps wait for."""
    for shape in day.sizes.shapes:
        if day.is_late() and shape != day.sizes.shapes[0]:
            raise TimeoutError(f"no time was left for {shape}")
        _compare(day, shape)
        bare.free(day)


def _compare(day: Day, shape: str) -> None:
    steps = day.sizes.trainer_steps
    mean = sum(map(sum, day.lengths)) / len(day.lengths)
    count = int(1.2 * steps * day.sizes.row / mean)
    path, tokenizer = write_text(day.scratch, day.lengths, count, SHAPES[shape].vocab_size)
    data = HHPreferenceDataModule(
        tokenizer, path, max_length=512, tokens_per_batch=day.sizes.row, cache_dir=str(day.scratch)
    )
    module = bare.build(day, "dpo", shape)
    watch = _Watch(day.device, steps)
    trainer = Trainer(
        accelerator="gpu" if day.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        default_root_dir=day.scratch / "run",
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    about = {
        "shape": shape,
        "task": "dpo",
        "rows_up_to": day.sizes.row,
        "steps": watch.timed,
        "tokens": watch.tokens,
        "text": "invented words in the lengths of real pairs",
    }
    day.note(f"{shape}: Trainer: tokens", watch.tokens_per_second(), "tokens/s", **about)
    found = watch.waits
    day.note(f"{shape}: Trainer: waits", sum(found.values()), "in a step", where=found, **about)
    module.to(day.device).train()
    step = bare.Step(module, [batch.to(day.device) for batch in watch.seen])
    step()
    taken = seconds(step, day.device, len(watch.seen))
    rate = sum(batch.num_tokens for batch in watch.seen) / len(watch.seen) / taken
    day.note(f"{shape}: bare step: tokens", rate, "tokens/s", **about)
    day.note(f"{shape}: Trainer over bare step", watch.tokens_per_second() / rate, "×", **about)


class _Watch(Callback):
    """Times the second half of a run, counts the waits of one step before it, and keeps batches."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.first = device, steps // 2
        self.timed, self.tokens, self.taken = steps - self.first, 0, 0.0
        self.seen: list[PackedBatch] = []
        self.waits: dict[str, int] = {}
        self._counting = ExitStack()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: PackedBatch, number: int
    ) -> None:
        if trainer.global_step == self.first:
            wait(self.device)
            self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: AlignmentModule, outputs: Any, batch: PackedBatch, *_: Any
    ) -> None:
        # From one step's end to the next's: what is counted includes the transfer of a batch.
        if trainer.global_step == self.first - 1:
            self.waits = self._counting.enter_context(waits(self.device))
        if trainer.global_step == self.first:
            self._counting.close()
        if trainer.global_step > self.first:
            self.tokens += batch.num_tokens
            if len(self.seen) < _SEEN:
                self.seen.append(batch)
        if trainer.global_step == trainer.max_steps:
            wait(self.device)
            self.taken = time.perf_counter() - self.began

    def tokens_per_second(self) -> float:
        """Row tokens of the timed steps per second."""
        return self.tokens / self.taken


def write_text(
    scratch: Path, lengths: Sequence[Sequence[int]], count: int, vocabulary: int
) -> tuple[str, str]:
    """Write pairs of invented words, a word a token, and a tokenizer for them."""
    rng = np.random.default_rng(0)
    letters = "aeioubcdfghklmnprstvwz"
    words = sorted({"".join(rng.choice(list(letters), rng.integers(3, 9))) for _ in range(_WORDS)})
    words = words[: max(vocabulary - 300, 1)]

    def text(tokens: int) -> str:
        return " ".join(rng.choice(words, max(tokens, 1)))

    path = scratch / "pairs.jsonl"
    with path.open("w") as file:
        for index in range(count):
            prompt, chosen, rejected = lengths[index % len(lengths)]
            # The roles' marks take a few tokens of their own.
            start = f"\n\nHuman: {text(prompt - 8)}\n\nAssistant: "
            pair = {"chosen": start + text(chosen - 1), "rejected": start + text(rejected - 1)}
            file.write(json.dumps(pair) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4 * _WORDS),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = ["\n\nHuman: \n\nAssistant: " + " ".join(words)] * 4
    tokenizer.train_from_iterator(sample, trainer)
    directory = scratch / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
    return str(path), str(directory)
