"""Continue an epoch on another number of ranks, or of micro-batches a step, than it began with.

What an epoch shows is an order cut into optimizer steps, and ranks matter to the cuts alone. The
rest of an epoch is therefore the rest of its order, cut for the ranks there are now. Where a step
is a fixed number of examples, or as many micro-batches over all ranks as before, the cuts are the
same too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from alignkit.data.deal.plan import Planner
from alignkit.data.keep.position import Plan

PARTS = "parts"
"""A plan's entry: the parts of the epoch that other ranks did, where there are any."""

_RANKS = ("world_size", "accumulate_grad_batches")


class Part(NamedTuple):
    """Hold the beginning of an epoch, or a piece of it, that one number of ranks did.

    Example:
        >>> Part(steps=3, world_size=2, accumulate=1).steps
        3

    Attributes:
        steps: Optimizer steps taken.
        world_size: Number of processes.
        accumulate: Micro-batches of one step on each.
    """

    steps: int
    world_size: int
    accumulate: int


def parts_before(saved: Mapping[str, Any], plan: Plan, batches: int) -> list[Part]:
    """Return the parts of an epoch that other ranks did, the first one first.

    Args:
        saved: The plan of the position that the epoch goes on from.
        plan: The plan of the ranks that go on.
        batches: Micro-batches that each rank of the saved plan had done, from the epoch's
            beginning. An open step does not count; it is taken again.
    """
    parts = [Part(*each) for each in saved.get(PARTS, [])]
    world, accumulate = (saved.get(name) for name in _RANKS)
    if same_ranks(saved, plan) or not (world and accumulate):
        return parts
    steps = batches // accumulate - steps_of(parts)
    return [*parts, Part(steps, world, accumulate)] if steps else parts


def same_ranks(saved: Mapping[str, Any], plan: Plan) -> bool:
    """Tell whether two plans have as many ranks and as many micro-batches a step."""
    return all(saved.get(name) == plan[name] for name in _RANKS)


def steps_of(parts: Sequence[Part]) -> int:
    """Count the optimizer steps of some parts."""
    return sum(part.steps for part in parts)


def comparable(saved: object, plan: Plan) -> tuple[Any, Plan]:
    """Remove from two plans what may differ within an epoch: the ranks, and what they decide."""
    if not isinstance(saved, Mapping):
        return saved, plan
    same = same_ranks(saved, plan)
    left_out = {PARTS, "batches"} if PARTS in saved else set()
    left_out |= set() if same else {*_RANKS, "batches"}
    kept = [{k: v for k, v in each.items() if k not in left_out} for each in (saved, plan)]
    return kept[0], kept[1]


def rest_of_epoch(parts: Sequence[Part], planner: Planner, epoch: int) -> NDArray[np.int64]:
    """Return the examples of an epoch that its earlier parts left, in the epoch's order.

    Args:
        parts: At least one.
        planner: The plan of any ranks; its own do not matter.
        epoch: The epoch.
    """
    first, *others = (
        (part.steps, replace(planner, world_size=part.world_size, accumulate=part.accumulate))
        for part in parts
    )
    order, cuts = first[1].of_epoch(epoch)
    rest = order[cuts[first[0]] :]
    for steps, theirs in others:
        rest = rest[theirs.cut(rest)[steps] :]
    return rest


def describe(part: Part, plan: Plan, taken: int, left: int, steps: int) -> str:
    """Tell in one line how an epoch goes on."""
    changes = [
        f"{now} {what} instead of {was}"
        for now, was, what in (
            (plan[_RANKS[0]], part.world_size, "rank(s)"),
            (plan[_RANKS[1]], part.accumulate, "micro-batch(es) a step"),
        )
        if now != was
    ]
    return (
        f"resuming mid-epoch with {' and '.join(changes)}: after {taken} steps, the epoch's other "
        f"{left} examples come in the same order, in {steps} steps"
    )


class Recount(Callback):
    """Let Lightning count an epoch that other ranks began in the micro-batches of these.

    Args:
        before: The number of micro-batches after which the run goes on, as they were counted.
        now: The same number as these ranks count: those of the same step, or of a whole epoch.
        reload: Whether the epoch that the run goes on with may have another length than others.
    """

    def __init__(self, before: int, now: int, reload: bool) -> None:
        self.before, self.now = before, now
        self._goes_on = reload
        self._reload: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the number of the micro-batch that the run goes on after."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready != self.before:  # the epoch was limited, or has ended
            return
        for tracker in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(tracker, name, getattr(tracker, name) + self.now - self.before)
        self.before = self.now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make Lightning ask for the loader again: the next epoch has another length."""
        if self._goes_on:
            self._goes_on = False
            self._reload = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the setting, which no resumed epoch begins with."""
        if self._reload is not None:
            trainer.reload_dataloaders_every_n_epochs = self._reload  # type: ignore[attr-defined]
