"""Divide examples into batches by token budget, evenly over ranks and micro-batches."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from alignkit.data.keep.position import Plan, check_plan, differences
from alignkit.data.read.hashes import digest_of
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)
_ATTEMPTS = 64


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Yield the micro-batches of one rank, each a list of example indices.

    An epoch is a random order cut into *steps* of up to ``tokens_per_batch · world · accumulate``
    tokens; a step's examples are dealt, the longest first, to the lightest of its
    ``world · accumulate`` micro-batches (longest-processing-time scheduling, Graham 1969). Every
    rank computes the same plan, so ranks agree without talking.

    What holds:
        * No micro-batch exceeds ``tokens_per_batch``, unless it is one long example.
        * Training: all ranks get the same number of micro-batches, none empty, a multiple of
          ``accumulate`` (so an optimizer step never straddles two steps of the plan), and the
          same number each epoch (Lightning asks once). An epoch may leave out up to
          ``world · accumulate - 1`` examples, others each time; one rank leaves out none.
        * Evaluation (``equal=False``): every example once over all ranks; ranks may differ by
          one micro-batch.
        * The plan depends on the arguments, ``seed`` and ``epoch`` alone.

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
        self._quotas = list(quotas or [(len(self._lengths), len(self._lengths))])
        self._budget = tokens_per_batch
        self._examples = examples_per_batch
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world = world_size
        self._accumulate = accumulate
        self._equal = equal
        self._content = dict(content or {})
        self.epoch = 0
        self._start = 0
        self._yielded = 0
        self._check_values()
        # A longer example fills a micro-batch of its own.
        self._sizes = np.minimum(self._lengths, tokens_per_batch)
        self._order, self._cuts = self._plan(0)
        self._steps = len(self._cuts) - 1

    def _check_values(self) -> None:
        drawn = sum(quota for _, quota in self._quotas)
        bins = self._world * self._accumulate
        if self._budget < 1:
            raise AlignkitError(f"tokens_per_batch={self._budget}: give at least 1")
        if drawn < self._world:
            raise AlignkitError(
                f"{drawn} examples cannot be dealt to {self._world} ranks; "
                "give more data or use fewer devices"
            )
        if self._examples is not None and self._examples < bins:
            raise AlignkitError(
                f"examples_per_batch={self._examples}: an optimizer step has {self._world} ranks "
                f"of {self._accumulate} micro-batches, so give at least {bins}"
            )

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """Return itself, since Lightning looks for ``set_epoch`` here."""
        return self

    @cached_property
    def fingerprint(self) -> Plan:
        """Return the plan that a position in an epoch belongs to, name to value."""
        return {
            **self._content,
            "tokens_per_batch": self._budget,
            "examples_per_batch": self._examples,
            "world_size": self._world,
            "accumulate_grad_batches": self._accumulate,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "examples": len(self._lengths),
            "tokens": int(self._lengths.sum()),
            "lengths": digest_of(self._lengths.tobytes()),
            "quotas": [list(quota) for quota in self._quotas],
            "batches": len(self),
        }

    def batch(self, number: int) -> list[int]:
        """Return the examples of the epoch's ``number``-th micro-batch of this rank, from 0."""
        return next(self._batches_from(number))

    def set_epoch(self, epoch: int) -> None:
        """Draw the plan of another epoch; a start offset belongs to the epoch it was loaded for."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self._start = 0
        if self._shuffle:
            self._order, self._cuts = self._plan(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the micro-batches yielded in it, skipped ones included.

        A loader with workers runs ahead of training; its owner knows better where training is.
        """
        return {"epoch": self.epoch, "batches": self._yielded, "plan": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a position; the next iteration starts there.

        Between two epochs anything may change, which is logged.

        Raises:
            AlignkitError: The position is mid-epoch and of another plan.
        """
        batches, plan = state["batches"], state.get("plan")
        # Of the epoch that it was a position in, which may have had more batches or fewer.
        length = plan.get("batches", len(self)) if isinstance(plan, Mapping) else len(self)
        finished = batches >= length
        if 0 < batches < length:
            check_plan(plan, self.fingerprint)
        elif self._rank == 0 and plan and (told := differences(plan, self.fingerprint)):
            log.info("the epoch begins with other data or batches than the checkpoint's: %s", told)
        # A finished epoch is the next one's beginning: a loader with workers draws at once.
        self.set_epoch(state["epoch"] + int(finished))
        self._start = self._yielded = 0 if finished else batches

    def __len__(self) -> int:
        """Count this rank's micro-batches in one whole epoch, whatever the start offset."""
        if self._equal:
            last = self._micro_batches(self._cuts[-1] - self._cuts[-2])
            return (self._steps - 1) * self._accumulate + last
        tail = self._cuts[-1] - self._cuts[-2]
        return self._steps - (1 if self._rank >= tail else 0)

    def __iter__(self) -> Iterator[list[int]]:
        self._yielded = self._start
        for batch in self._batches_from(self._start):
            self._yielded += 1
            yield batch

    def _batches_from(self, start: int) -> Iterator[list[int]]:
        """Yield the epoch's micro-batches of this rank without the first ``start``."""
        order, cuts = self._order, self._cuts
        for step in range(start // self._accumulate, len(cuts) - 1):
            members = order[cuts[step] : cuts[step + 1]]
            rounds = self._micro_batches(len(members))
            bins = self._deal(members, self._world * rounds)
            for micro in range(rounds):
                batch = bins[micro * self._world + self._rank]
                if batch and step * self._accumulate + micro >= start:
                    yield batch

    def _micro_batches(self, examples: int) -> int:
        """Count a step's micro-batches, fewer than usual where the epoch has too few examples."""
        return max(1, min(self._accumulate, examples // self._world))

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """Draw an order and the bounds of its steps, with as many steps as epoch 0 has."""
        for attempt in range(_ATTEMPTS if epoch else 1):
            order = self._draw(epoch, attempt)
            cuts = self._cut(order)
            if epoch == 0 or self._even_out(order, cuts):
                return order, cuts
        return self._plan(0)

    def _draw(self, epoch: int, attempt: int) -> NDArray[np.int64]:
        parts = []
        first = 0
        rng = np.random.default_rng([self._seed, epoch, attempt])
        for size, drawn in self._quotas:
            part = rng.permutation(size) if self._shuffle else np.arange(size)
            parts.append(part[:drawn] + first)
            first += size
        order = np.concatenate(parts)
        if self._shuffle and len(parts) > 1:
            rng.shuffle(order)
        return order.astype(np.int64)

    def _cut(self, order: NDArray[np.int64]) -> list[int]:
        """Split an order greedily into steps."""
        bins = self._world * self._accumulate
        if self._examples is not None:
            cuts = [*range(0, len(order), self._examples), len(order)]
            too_few = len(cuts) > 2 and cuts[-1] - cuts[-2] < self._world
            return cuts[:-1] if too_few and self._equal else cuts
        ends = np.concatenate([[0], np.cumsum(self._sizes[order])])
        cuts = [0]
        while cuts[-1] < len(order):
            start = cuts[-1]
            limit = ends[start] + bins * self._budget
            end = int(np.searchsorted(ends, limit, side="right")) - 1
            while not self._fits(order[start:end]):
                end -= 1
            cuts.append(end)
        return self._mend_tail(order, cuts) if self._equal else cuts

    def _mend_tail(self, order: NDArray[np.int64], cuts: list[int]) -> list[int]:
        """Give every micro-batch of the last step an example, or leave the last examples out."""
        bins = self._world * self._accumulate
        if cuts[-1] - cuts[-2] >= bins:
            return cuts
        if len(cuts) == 2:
            return [0, cuts[-1] - cuts[-1] % self._world]
        middle = cuts[-1] - bins
        enough = middle - cuts[-3] >= bins
        if enough and self._fits(order[cuts[-3] : middle]):
            return [*cuts[:-2], middle, cuts[-1]]
        return cuts[:-1]

    def _even_out(self, order: NDArray[np.int64], cuts: list[int]) -> bool:
        """Split the fullest steps until there are as many as in epoch 0; False if that fails."""
        bins = self._world * self._accumulate
        if len(cuts) - 1 > self._steps:
            return False
        while len(cuts) - 1 < self._steps:
            counts = np.diff(cuts)
            step = int(np.argmax(counts))
            middle = cuts[step] + int(counts[step]) // 2
            halves = (order[cuts[step] : middle], order[middle : cuts[step + 1]])
            if counts[step] < 2 * bins or not all(self._fits(half) for half in halves):
                return False
            cuts.insert(step + 1, middle)
        return True

    def _fits(self, members: NDArray[np.int64]) -> bool:
        bins = self._world * self._accumulate
        if bins == 1 or len(members) <= bins:
            return True
        loads = [int(self._sizes[batch].sum()) for batch in self._deal(members, bins)]
        return max(loads) <= self._budget

    def _deal(self, members: NDArray[np.int64], bins: int) -> list[list[int]]:
        """Divide examples among ``bins`` micro-batches, the longest first to the lightest."""
        if bins == 1:
            return [members.tolist()]
        sizes = self._sizes[members]
        dealt: list[list[int]] = [[] for _ in range(bins)]
        loads = [(0, number) for number in range(bins)]
        for index in np.argsort(-sizes, kind="stable").tolist():
            load, number = loads[0]
            heapq.heapreplace(loads, (load + int(sizes[index]), number))
            dealt[number].append(int(members[index]))
        return dealt
