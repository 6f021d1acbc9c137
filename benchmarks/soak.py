"""A long run at small size: does anything grow with the number of steps?

    python benchmarks/soak.py --steps 3000 [--ranks 2] [--every 50] --json soak.json

A tiny random model trains by DPO and LoRA through the Trainer, with a checkpoint and a validation
every ``--every`` steps. After each validation rank 0 notes its resident memory, open file
descriptors, threads and the bytes of its event file. A line says which of them grew between the
second quarter of the notes and the last, and the exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit import DPOModule, HHPreferenceDataModule
from alignkit.callbacks import Checkpoint
from alignkit.utils.atomic import write_atomically

# What may grow between two quarters of a run before it counts: allocators keep a few pages.
ALLOWED = {"rss_mib": 0.03, "descriptors": 0.0, "threads": 0.0, "event_bytes_per_step": 0.03}
PAIRS = 64


class Note(L.Callback):
    """Notes what rank 0 holds after each validation, and writes it at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        # The trainer's own `log_dir` is a broadcast, which the other ranks would have to join.
        assert isinstance(trainer.logger, TensorBoardLogger)
        events = Path(trainer.logger.log_dir).glob("events.out.*")
        self.notes.append(
            {
                "step": trainer.global_step,
                "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "descriptors": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "event_bytes": sum(file.stat().st_size for file in events),
            }
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.notes))


def make_inputs(home: Path) -> None:
    """Write a tiny model with a tokenizer of bytes, and pairs of random words."""
    words = models.BPE(
        {c: i for i, c in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []
    )
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(home / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / "model")
    draw = random.Random(0)
    (home / "data").mkdir()
    for split, count in (("train", PAIRS), ("test", 8)):
        rows = []
        for i in range(count):
            said = [
                " ".join(draw.choices(["tea", "salt", "rain"], k=draw.randint(1, 6))) for _ in "ab"
            ]
            prompt = f"\n\nHuman: {i}?\n\nAssistant:"
            rows.append({"chosen": f"{prompt} {said[0]}!", "rejected": f"{prompt} {said[1]}."})
        (home / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def soak(home: Path, steps: int, every: int, ranks: int) -> list[dict[str, float]]:
    """Train, and return the notes."""
    make_inputs(home)
    base = str(home / "model")
    torch.manual_seed(0)
    module = DPOModule(base, lora={"r": 4})  # type: ignore[arg-type]
    data = HHPreferenceDataModule(
        base, str(home / "data"), examples_per_batch=8, cache_dir=str(home / "cache")
    )
    L.Trainer(
        default_root_dir=home,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=TensorBoardLogger(home, name="soak"),
        callbacks=[
            Checkpoint(every_n_train_steps=every, save_last=True),
            Note(home / "notes.json"),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
    notes: list[dict[str, float]] = json.loads((home / "notes.json").read_text())
    return notes


def growth(notes: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Compare the second quarter of the notes with the last, quantity by quantity."""
    for before, note in zip([{"step": 0, "event_bytes": 0}, *notes], notes, strict=False):
        written = note["event_bytes"] - before["event_bytes"]
        note["event_bytes_per_step"] = written / (note["step"] - before["step"])
    quarter = len(notes) // 4
    found = {}
    for name, allowed in ALLOWED.items():
        early = median(note[name] for note in notes[quarter : 2 * quarter])
        late = median(note[name] for note in notes[-quarter:])
        found[name] = {"early": early, "late": late, "flat": late <= early * (1 + allowed)}
    return found


def main() -> int:
    """Run, print a line for each quantity, write the numbers."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--steps", type=int, default=3000)
    flags.add_argument("--every", type=int, default=50, help="steps between validations")
    flags.add_argument("--ranks", type=int, default=1)
    flags.add_argument("--json", metavar="FILE")
    chosen = flags.parse_args()
    for name in ("every", "ranks"):
        if getattr(chosen, name) < 1:
            print(f"error: --{name}: must be 1 or more", file=sys.stderr)
            return 2
    if chosen.steps < 8 * chosen.every:
        print("error: --steps: give at least eight times --every", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as home:
        notes = soak(Path(home), chosen.steps, chosen.every, chosen.ranks)
    found = growth(notes)
    for name, each in found.items():
        state = "flat" if each["flat"] else "GREW"
        print(f"{name}: {each['early']:.1f} early, {each['late']:.1f} late: {state}")
    if chosen.json:
        told = {"steps": chosen.steps, "ranks": chosen.ranks, "growth": found, "notes": notes}
        write_atomically(Path(chosen.json), json.dumps(told, indent=1) + "\n")
    return 0 if all(each["flat"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
