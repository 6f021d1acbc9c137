"""Divide examples into batches by token budget, evenly over ranks and micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from alignkit.data.deal.elastic import (
    PARTS,
    Part,
    Recount,
    comparable,
    describe,
    parts_before,
    rest_of_epoch,
    same_ranks,
    steps_of,
)
from alignkit.data.deal.plan import Planner
from alignkit.data.keep.position import Plan, check_plan, differences
from alignkit.data.read.hashes import digest_of

log = logging.getLogger(__name__)


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Yield the micro-batches of one rank, each a list of example indices.

    An epoch is a random order cut into *steps* of up to ``tokens_per_batch · world · accumulate``
    tokens; a step's examples are dealt, the longest first, to the lightest of its
    ``world · accumulate`` micro-batches (longest-processing-time scheduling, Graham 1969). Every
    rank computes the same plan, so ranks agree without talking.

    What holds:
        * No micro-batch exceeds ``tokens_per_batch``, unless it is one long example.
        * Training: all ranks get the same number of micro-batches, none empty, ``accumulate`` a
          step (so an optimizer step never straddles two steps of the plan), and the same number
          each epoch (Lightning asks once). The last step of few examples has fewer micro-batches.
          An epoch may leave out up to ``world - 1`` examples, others each time; one rank leaves
          out none.
        * Evaluation (``equal=False``): every example once over all ranks; ranks may differ by
          one micro-batch.
        * The plan depends on the arguments, ``seed`` and ``epoch`` alone.
        * A position taken over from another number of ranks goes on with the rest of the same
          order, and with the same steps where `alignkit.data.deal.elastic` says so.

    Args:
        lengths: [E] tokens of each example.
        tokens_per_batch: Budget of one micro-batch.
        examples_per_batch: Examples of one optimizer step over all ranks, instead of a budget.
        shuffle: Draw a new order each epoch.
        seed: Seeds the orders.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches of one optimizer step.
        equal: Whether all ranks must get equally many micro-batches (training).
        quotas: ``(size, drawn)`` for each source that the examples come from, in order: how many
            examples each has and how many of them an epoch draws. Default: all.
        content: What the examples are, for the plan that a position belongs to; see
            `alignkit.data.keep.position`.

    Raises:
        AlignkitError: Fewer examples than ranks, or a budget or size that makes no sense.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        tokens_per_batch: int,
        *,
        examples_per_batch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        equal: bool = True,
        quotas: Sequence[tuple[int, int]] | None = None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, np.int64)
        self._planner = Planner(
            np.minimum(self._lengths, tokens_per_batch),
            list(quotas or [(len(self._lengths), len(self._lengths))]),
            tokens_per_batch,
            examples_per_batch,
            shuffle,
            seed,
            world_size,
            accumulate,
            equal,
        )
        self._digest = digest_of(self._lengths.tobytes())
        self._rank = rank
        self._world = world_size
        self._accumulate = accumulate
        self._content = dict(content or {})
        self.epoch = 0
        self._start = 0
        self._yielded = 0
        # What other ranks did of this epoch, and how many steps.
        self._parts: list[Part] = []
        self._done = 0
        self._order, self._cuts = self._planner.of_epoch(0)

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """Return itself, since Lightning looks for ``set_epoch`` here."""
        return self

    @property
    def fingerprint(self) -> Plan:
        """Return the plan that a position in an epoch belongs to, name to value."""
        return {
            **self._content,
            "tokens_per_batch": self._planner.tokens_per_batch,
            "examples_per_batch": self._planner.examples_per_batch,
            "world_size": self._world,
            "accumulate_grad_batches": self._accumulate,
            "seed": self._planner.seed,
            "shuffle": self._planner.shuffle,
            "examples": len(self._lengths),
            "tokens": int(self._lengths.sum()),
            "lengths": self._digest,
            "quotas": [list(quota) for quota in self._planner.quotas],
            "batches": len(self),
            **({PARTS: [list(part) for part in self._parts]} if self._parts else {}),
        }

    def recount(self, state: Mapping[str, Any]) -> Recount | None:
        """Return the callback that a run needs to go on from a loaded position, if it needs one."""
        if self._parts:
            return Recount(state["batches"], self._start, reload=True)
        whole = (state.get("plan") or {}).get("batches", 0)
        # Lightning takes an epoch that was shorter than this run's for an unfinished one.
        at_the_end = self._start == 0 and whole not in (0, len(self))
        return Recount(whole, len(self), reload=False) if at_the_end else None

    def steps_ahead(self, epochs: int) -> int:
        """Count the optimizer steps from the loaded position to the end of ``epochs`` epochs."""
        this = self._done + len(self._cuts) - 1 - self._start // self._accumulate
        return this + (epochs - self.epoch - 1) * self._planner.steps

    def batch(self, number: int) -> list[int]:
        """Return the examples of the epoch's ``number``-th micro-batch of this rank, from 0."""
        return next(self._batches_from(number))

    def set_epoch(self, epoch: int) -> None:
        """Draw the plan of another epoch; a start offset belongs to the epoch it was loaded for."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self._start = 0
        if self._planner.shuffle or self._parts:
            self._parts, self._done = [], 0
            self._order, self._cuts = self._planner.of_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the micro-batches yielded in it, skipped ones included.

        A loader with workers runs ahead of training; its owner knows better where training is.
        """
        return {"epoch": self.epoch, "batches": self._yielded, "plan": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a position; the next iteration starts there.

        Within an epoch the number of ranks and of micro-batches a step may change, between two
        anything may, which is logged.

        Raises:
            AlignkitError: The position is mid-epoch and of another plan otherwise.
        """
        batches, plan = state["batches"], state.get("plan")
        # Of the epoch that it was a position in, which may have had more batches or fewer.
        length = plan.get("batches", len(self)) if isinstance(plan, Mapping) else len(self)
        finished = batches >= length
        own = self.fingerprint
        if 0 < batches < length:
            check_plan(*comparable(plan, own))
            assert isinstance(plan, Mapping)
            self.set_epoch(state["epoch"])
            batches = self._go_on(plan, own, batches)
        elif self._rank == 0 and plan and (told := differences(plan, own, but=(PARTS,))):
            log.info("the epoch begins with other data or batches than the checkpoint's: %s", told)
        # A finished epoch is the next one's beginning: a loader with workers draws at once.
        self.set_epoch(state["epoch"] + int(finished))
        self._start = self._yielded = 0 if finished else batches

    def _go_on(self, saved: Mapping[str, Any], own: Plan, batches: int) -> int:
        """Compute the rest of an epoch that other ranks began, and return where it begins here."""
        parts = parts_before(saved, own, batches)
        if not parts:
            return batches
        rest = rest_of_epoch(parts, self._planner, self.epoch)
        self._parts, self._done = parts, steps_of(parts)
        # Fewer than the ranks cannot be dealt, as at the end of any epoch.
        enough = len(rest) >= self._world
        self._order, self._cuts = rest, self._planner.cut(rest) if enough else [0]
        if same_ranks(saved, own) and parts == [Part(*each) for each in saved.get(PARTS, [])]:
            return batches  # once more as it was saved, which may be within a step
        if self._rank == 0:
            left, steps = len(rest), len(self._cuts) - 1
            log.info("%s", describe(parts[-1], own, self._done, left, steps))
        return self._done * self._accumulate

    def __len__(self) -> int:
        """Count this rank's micro-batches in one whole epoch, whatever the start offset."""
        if len(self._cuts) == 1:  # other ranks left nothing that can be dealt
            return self._done * self._accumulate
        tail = self._cuts[-1] - self._cuts[-2]
        if self._planner.equal:
            whole = self._done + len(self._cuts) - 2
            return whole * self._accumulate + self._planner.micro_batches(tail)
        return self._planner.steps - (1 if self._rank >= tail else 0)

    def __iter__(self) -> Iterator[list[int]]:
        self._yielded = self._start
        for batch in self._batches_from(self._start):
            self._yielded += 1
            yield batch

    def _batches_from(self, start: int) -> Iterator[list[int]]:
        """Yield the epoch's micro-batches of this rank without the first ``start``."""
        order, cuts = self._order, self._cuts
        for step in range(start // self._accumulate, self._done + len(cuts) - 1):
            members = order[cuts[step - self._done] : cuts[step - self._done + 1]]
            rounds = self._planner.micro_batches(len(members))
            bins = self._planner.deal(members, self._world * rounds)
            for micro in range(rounds):
                batch = bins[micro * self._world + self._rank]
                if batch and step * self._accumulate + micro >= start:
                    yield batch
