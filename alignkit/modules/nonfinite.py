"""Stop or skip an optimizer step whose loss or gradient is not finite.

The message names the rows of the batch at fault, and the batch is kept in a file for replay:

    module = DPOModule.load_from_checkpoint("last.ckpt").train()
    module.compute_loss(load_batch("nonfinite-step12-rank0.pt")).loss_sum
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.batch import Span
from alignkit.engine import PackedBatch
from alignkit.errors import AlignkitError
from alignkit.models.archive import read_archive, write_archive
from alignkit.modules.hook import HasLoss
from alignkit.modules.sharding import units
from alignkit.modules.window import MicroBatch, WindowTotals

OnNonFinite = Literal["stop", "skip"]
MOST_SKIPPED_IN_A_ROW = 25
_ROWS_SHOWN = 20
log = logging.getLogger(__name__)


class StepGuard:
    """Decide before every optimizer step whether to take it, the same on all ranks.

    Args:
        policy: ``stop`` or ``skip``.

    Attributes:
        skipped: Number of steps skipped so far.

    Raises:
        AlignkitError: An unknown policy.
    """

    def __init__(self, policy: OnNonFinite) -> None:
        if policy not in get_args(OnNonFinite):
            raise AlignkitError(f"model.on_nonfinite={policy!r}: choose stop or skip")
        self.policy = policy
        self.skipped = 0
        self._in_a_row = 0

    def admits(self, module: HasLoss, totals: WindowTotals, norm: Tensor | None) -> bool:
        """Tell whether the step may be taken; waits for the device once.

        Args:
            module: The module in training, whose gradients are complete.
            totals: The step's totals, the same on every rank.
            norm: The gradient's norm, the same on every rank; ``None`` where a gradient scaler
                handles gradients that overflowed.

        Raises:
            AlignkitError: The step is not finite and the policy is to stop, or it is the last of
                `MOST_SKIPPED_IN_A_ROW` skipped steps.
        """
        loss = totals.means["loss"]
        seen = [loss, totals.weight, *([norm.to(loss)] if norm is not None else [])]
        values = torch.stack(seen).tolist()
        if all(map(_is_finite, values)):
            self._in_a_row = 0
            return True
        named = zip(("loss", "weight", "gradient's norm"), values, strict=False)
        what = next(f"the {name} is {value}" for name, value in named if not _is_finite(value))
        if norm is not None:  # a gradient scaler still has to see the gradients
            for parameter in module.parameters():
                parameter.grad = None  # an optimizer skips a parameter without gradient
        where = _locate_nonfinite(module, totals.micro_batches)
        told = f"global step {module.global_step}: {what}; {where}"
        if self.policy == "stop":
            raise AlignkitError(
                f"{told}; no update was made and the last checkpoint is good: mend or drop the "
                "rows, lower the learning rate, or pass model.on_nonfinite=skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        if module.trainer.is_global_zero:
            log.warning("%s; the step is skipped", told)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise AlignkitError(
                f"global step {module.global_step}: {self._in_a_row} steps in a row were not "
                "finite; resume from the last checkpoint with a lower learning rate"
            )
        return False


def refuse_nonfinite(checkpoint: Mapping[str, Any], step: int) -> None:
    """Refuse to write a checkpoint with a parameter or an optimizer state that is not finite.

    Raises:
        AlignkitError: There is one; the message names it.
    """
    tensors = dict(_tensors(checkpoint.get("state_dict", {}), ""))
    tensors |= dict(_tensors(checkpoint.get("optimizer_states", []), "optimizer"))
    kept = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not kept:
        return
    divided = any(isinstance(t, DTensor) for t in kept.values())
    own = [t.to_local() if isinstance(t, DTensor) else t for t in kept.values()]
    device = own[0].device
    flags = torch.stack([t.isfinite().all().to(device) for t in own])
    if divided:  # each rank holds a part, and all of them must refuse
        flags = flags.int()
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    finite = flags.tolist()
    wrong = [name for name, is_finite in zip(kept, finite, strict=True) if not is_finite]
    if wrong:
        raise AlignkitError(
            f"global step {step}: {wrong[0]} is not finite, so no checkpoint was written and the "
            "last one stays; resume from it with a lower learning rate"
        )


def save_batch(path: Path, batch: PackedBatch, **about: Any) -> None:
    """Write a batch to a file that `load_batch` reads.

    Args:
        path: The file.
        batch: The batch, on any device.
        **about: Plain values to keep beside it, such as the step.
    """
    held = {field.name: getattr(batch, field.name) for field in fields(PackedBatch)}
    tensors = {name: value.cpu() for name, value in held.items() if isinstance(value, Tensor)}
    spans = [[span.start, span.prompt, list(span.responses)] for span in batch.spans]
    write_archive(path, {**about, "tensors": tensors, "spans": spans})


def load_batch(path: str | os.PathLike[str]) -> PackedBatch:
    """Read a batch that was kept because its loss or gradient was not finite.

    Raises:
        AlignkitError: The file is missing or damaged.
    """
    saved = read_archive(Path(path))
    spans = tuple(Span(start, prompt, tuple(rest)) for start, prompt, rest in saved["spans"])
    return PackedBatch(**saved["tensors"], spans=spans)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for NaN too


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name} {key}".strip())


def _locate_nonfinite(module: HasLoss, micro_batches: list[MicroBatch]) -> str:
    """Return a text that names the rows at fault on all ranks, and the files that keep them.

    Every rank must call it.
    """
    if units(module):  # computing again would need all ranks to compute as often
        return "its rows are not sought in a sharded model; ddp would name them"
    found = [m for m in micro_batches if not _has_finite_loss(module, m.batch)]
    place = Path(module.trainer.log_dir or module.trainer.default_root_dir)  # broadcasts
    told = [_describe_batch(module, micro, place) for micro in found[:1]]
    everybody: list[list[str]] = [told]
    if dist.is_available() and dist.is_initialized():
        everybody = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everybody, told)
    reports = [report for rank in everybody for report in rank]
    return "; ".join(reports) or "no micro-batch of it is at fault alone"


def _describe_batch(module: HasLoss, micro: MicroBatch, place: Path) -> str:
    count = micro.batch.num_examples
    examples = range(count) if count > 1 else ()
    wrong = [i for i in examples if not _has_finite_loss(module, _take_one(micro.batch, i))]
    rows = _row_names(module, micro.number, count)
    shown = [rows[i] for i in wrong or range(count)]
    more = f" and {len(shown) - _ROWS_SHOWN} more" if len(shown) > _ROWS_SHOWN else ""
    step, rank = module.global_step, module.global_rank
    path = place / f"nonfinite-step{step}-rank{rank}.pt"
    try:
        save_batch(path, micro.batch, step=step, number=micro.number, rows=rows)
        kept = f"the batch is kept in {path}"
    except AlignkitError as error:
        kept = f"the batch could not be kept ({error})"
    return f"{', '.join(shown[:_ROWS_SHOWN])}{more}; {kept}"


def _take_one(batch: PackedBatch, index: int) -> PackedBatch:
    return batch.to("cpu").take([index]).to(batch.input_ids.device)


def _row_names(module: HasLoss, number: int, count: int) -> list[str]:
    """Return ``file:line`` of each example of a micro-batch, or its number if that is unknown."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    rows = getattr(data, "rows_of_batch", None)
    if rows is None:
        return [f"example {i} of micro-batch {number} of the epoch" for i in range(count)]
    return [f"{name}:{line}" for name, line in rows(number)]


def _has_finite_loss(module: HasLoss, batch: PackedBatch) -> bool:
    """Tell whether loss and gradient of a batch are finite, by computing them again."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), module.trainer.precision_plugin.train_step_context():
        loss = module.compute_loss(batch).loss_sum
    if not _is_finite(loss.item()) or not loss.requires_grad:
        return _is_finite(loss.item())
    # `backward` would run DDP's hooks, which synchronise ranks.
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _is_finite(nn.utils.get_total_norm([g for g in gradients if g is not None]).item())
