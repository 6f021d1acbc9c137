"""Who takes which optimizer steps, and when.

alignkit is compared with every peer on the very same steps: beside a peer whose batches are
sorted by length it trains on those sorted batches too. A round is one turn of every peer, each
next to a turn of alignkit; every second round runs backwards (A B B C … C B B A), so that a
machine that slows down slows both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignkit.engine import Example
from sidebyside.examples import padded_length
from sidebyside.job import Arm

OURS = "alignkit"


@dataclass(frozen=True)
class Turn:
    """Some optimizer steps of one arm.

    Attributes:
        arm: Who takes them.
        peer: Whom alignkit is compared with by them; the arm itself where it is a peer.
        steps: Example numbers of every step.
    """

    arm: str
    peer: str
    steps: list[list[int]]


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        parity: The steps that every arm takes first, on short examples.
        rounds: The turns of each round, in order.
    """

    parity: list[list[int]]
    rounds: list[list[Turn]]

    def of(self, arm: str) -> list[Turn]:
        """An arm's turns, in order."""
        return [turn for turns in self.rounds for turn in turns if turn.arm == arm]


def examples_needed(
    rounds: int, steps: int, per_step: int, parity_steps: int, per_parity_step: int
) -> int:
    """How many examples `make_plan` draws from."""
    return rounds * steps * per_step + 3 * parity_steps * per_parity_step


def make_plan(
    peers: Sequence[Arm],
    examples: Sequence[Example],
    *,
    rounds: int,
    steps: int,
    per_step: int,
    parity_steps: int,
    per_parity_step: int,
    seed: int,
) -> Plan:
    """Deal examples to steps and steps to turns.

    Args:
        peers: Whom alignkit is compared with.
        examples: As many as `examples_needed` says.
        rounds: Turns of every peer.
        steps: Optimizer steps of a turn.
        per_step: Examples of a step.
        parity_steps: Steps that every arm takes first.
        per_parity_step: Examples of a parity step; they are short, so that steps in fp32 cost
            little on a CPU.
        seed: Of the order in which batches of different length come.
    """
    timed = rounds * steps * per_step
    rest = sorted(range(timed, len(examples)), key=lambda i: padded_length(examples[i]))
    orders = {
        False: _cut(list(range(timed)), per_step),
        True: _cut(sorted(range(timed), key=lambda i: padded_length(examples[i])), per_step),
    }
    np.random.default_rng(seed).shuffle(orders[True])
    turns: list[list[Turn]] = []
    for number in range(rounds):
        rows = slice(number * steps, (number + 1) * steps)
        order: list[Turn] = []
        for place, peer in enumerate(peers):
            batches = orders[peer.by_length][rows]
            pair = [Turn(peer.name, peer.name, batches), Turn(OURS, peer.name, batches)]
            order += pair[::-1] if place % 2 else pair
        turns.append(order[::-1] if number % 2 else order)
    return Plan(_cut(rest[: parity_steps * per_parity_step], per_parity_step), turns)


def our_micro_batches(
    steps: Sequence[Sequence[int]], examples: Sequence[Example], budget: int
) -> int:
    """Into how many micro-batches alignkit cuts every step, so that none passes the budget."""
    longest = max(sum(examples[index].num_tokens for index in step) for step in steps)
    return min(-(-longest // budget), min(len(step) for step in steps))


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
