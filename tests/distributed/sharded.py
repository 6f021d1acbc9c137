"""Runs that are the same on one process and on several that shard: ``python -m … CASES HOME BASE``.

Under ``LOCAL_RANK`` and ``WORLD_SIZE`` the process is one rank of a sharded run.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from alignkit import HHPreferenceDataModule, HHSFTDataModule
from alignkit.callbacks import Checkpoint
from alignkit.engine import blocks_of, head
from alignkit.modules import DPOModule, RewardModule, SFTModule, sharding
from alignkit.modules.strategy import ShardedStrategy
from tests.modules.helpers import trainer

RANKS = int(os.environ.get("WORLD_SIZE", 1))
LORA = {"r": 4, "dropout": 0.0}


def adamw(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)


class Beside(SFTModule):
    """Trains a parameter beside the model, which every process holds whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def compute_loss(self, batch: Any) -> Any:
        output = super().compute_loss(batch)
        return replace(output, loss_sum=output.loss_sum * self.scale)

    def configure_optimizers(self) -> Any:
        own = [p for p in self.model.parameters() if p.requires_grad]
        return AdamW([{"params": own}, {"params": [self.scale]}], lr=1e-3)


CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "lora": (SFTModule, {"lora": LORA}, {}),
    "full": (SFTModule, {"lora": None}, {"gradient_clip_val": 0.5, "num_sanity_val_steps": 0}),
    "dpo": (DPOModule, {"lora": LORA}, {"gradient_clip_val": 0.01}),
    "mixed": (DPOModule, {"lora": LORA, "dtype": "bfloat16"}, {"precision": "bf16-mixed"}),
    "full_dpo": (DPOModule, {"lora": None, "activation_checkpointing": True}, {}),
    "beside": (Beside, {"lora": LORA}, {}),
    "reward": (RewardModule, {"lora": LORA}, {"num_sanity_val_steps": 0}),
}
# Heads that are trained take a row in chunks; ranks have different numbers of them.
head.CHUNK = 8


class Keep(L.Callback):
    """Keeps the loss and the norm of every step, and what this rank holds whole."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.shared = 0
        self.taken = 0
        self.whole: set[int] = set()
        self.undivided: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if not trainer.is_global_zero or trainer.global_step == self.taken:
            return
        self.taken = trainer.global_step
        logged = trainer.callback_metrics
        self.steps.append([float(logged["train/loss"]), float(logged["train/grad_norm"])])

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        """Between the two passes no block is whole, of the policy or of the reference."""
        blocks = [b for model in sharding.models_of(module) for b in blocks_of(model)]
        self.whole.add(sum(map(count_whole, blocks)))

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.taken = trainer.global_step
        named = module.model.named_parameters()
        self.undivided = [name for name, p in named if not isinstance(p, DTensor)]
        reference = getattr(module, "reference", None)
        if reference is not None:
            own = dict(module.model.named_parameters())
            for name, frozen in reference.model.named_parameters():
                mine = own[name]
                same = getattr(frozen, "_local_tensor", frozen).data_ptr()
                self.shared += same == getattr(mine, "_local_tensor", mine).data_ptr()


def count_whole(block: Any) -> int:
    """Count a block's weights that this process holds whole."""
    return sum(
        p.numel()
        for name, p in block.named_parameters()
        if "lora_" not in name and not p.is_meta and not isinstance(p, DTensor)
    )


def count_held_blocks(module: Any) -> list[float]:
    """Count, whenever a block is sharded, how many are whole in this process; fills the list."""
    counts: list[float] = []

    def shard(part: Any, **options: Any) -> None:
        blocks = [b for model in sharding.models_of(module) for b in blocks_of(model)]
        if any(part is block for block in blocks):
            counts.append(sum(map(count_whole, blocks)) / count_whole(part))
        fully_shard(part, **options)

    sharding.fully_shard = shard  # type: ignore[assignment]
    return counts


def run(case: str, home: Path, base: str, resume: str | None = None) -> None:
    kind, options, settings = CASES[case]
    ranks = RANKS
    if ranks > 1:
        os.environ["WORLD_SIZE"] = str(ranks)  # Lightning deletes it at the end of a run
    source = HHSFTDataModule if issubclass(kind, SFTModule) else HHPreferenceDataModule
    # Small batches, so that one rank has more of them to validate on than the other.
    data = source(
        base,
        str(home / "data"),
        examples_per_batch=8,
        tokens_per_batch=150,
        cache_dir=str(home / "cache"),
    )
    # One kind of run asks for checkpoints without shards.
    one_file = case == "full_dpo"
    strategy = ShardedStrategy(save_distributed_checkpoint=False) if one_file else "fsdp2"
    keep = Keep()
    place = home / f"{case}-{ranks}{'-resumed' if resume else ''}"
    run = trainer(
        place,
        devices=ranks,
        accumulate_grad_batches=2 if ranks == 1 else 1,
        strategy=strategy if ranks > 1 else "auto",
        max_epochs=2,
        callbacks=[
            Checkpoint(dirpath=str(place), every_n_train_steps=2, save_top_k=-1, save_last=True),
            keep,
        ],
        enable_checkpointing=True,
        **settings,
    )
    torch.manual_seed(0)
    with run.init_module() if ranks > 1 else nullcontext():
        module = kind(base, optimizer=adamw, schedule="linear", **options)
    held = count_held_blocks(module)
    run.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in run.strategy.lightning_module_state_dict().items()
    }
    if run.is_global_zero:
        val = float(run.callback_metrics["val/loss"])
        found = {"steps": keep.steps, "val": val, "shared": keep.shared, "held": held}
        found |= {"whole": sorted(keep.whole), "undivided": keep.undivided}
        (place / "found.json").write_text(json.dumps(found))
        torch.save(state, place / "end.pt")


if __name__ == "__main__":
    cases, home, base, *rest = sys.argv[1:]
    for case in cases.split(","):
        run(case, Path(home), base, *rest)
