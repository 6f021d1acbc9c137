"""How evenly a step's tokens fall on 8, 64 and 512 ranks, and what that makes of their speed.

    python benchmarks/balance.py [--lengths FILE] [--tokens-per-batch 4096] [--grow 10] \\
        [--step-seconds S --adapter-mib M] [--json FILE]

The lengths are those of real pairs (``hh_lengths.json``), repeated ``--grow`` times in other
orders, so that 512 ranks have an epoch of many steps. *Load* is what a step waits for: the sum
over steps of the heaviest rank's tokens, over that of the mean. Planning takes the seconds shown;
every rank plans the whole epoch by itself.

With ``--step-seconds``, measured for a full micro-batch on one device, the expected efficiency is
``mean / (heaviest + all-reduce)``, under these assumptions: time is proportional to tokens; the
all-reduce of the adapters' fp32 gradients is not hidden behind the backward pass; rings move
``2 (n - 1) / n`` times the bytes at 300 GB/s within eight devices and 40 GB/s beyond; a hop takes
20 µs. Loading data and writing checkpoints are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sidebyside.examples import read_lengths

from alignkit.data import TokenBudgetBatchSampler
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import write_atomically

WORLDS = (8, 64, 512)
LENGTHS = Path(__file__).with_name("hh_lengths.json")
GOAL = 1.02


def balance(lengths: np.ndarray, budget: int, world: int) -> dict[str, Any]:
    """Deal an epoch to every rank and return the loads of its steps."""
    began = time.perf_counter()
    sampler = TokenBudgetBatchSampler(lengths, budget, world_size=world)
    seconds = time.perf_counter() - began
    order, cuts, planner = sampler._order, sampler._cuts, sampler._planner
    heaviest = mean = worst = 0.0
    for start, end in itertools.pairwise(cuts):
        loads = [lengths[bin].sum() for bin in planner.deal(order[start:end], world)]
        heaviest += max(loads)
        mean += float(np.mean(loads))
        worst = max(worst, max(loads) / float(np.mean(loads)))
    steps = len(cuts) - 1
    return {
        "ranks": world,
        "steps": steps,
        "load": heaviest / mean,
        "worst_step": worst,
        "budget_used": mean / (steps * budget),
        "planning_seconds": seconds,
    }


def efficiency(found: dict[str, Any], step_seconds: float, adapter_bytes: float) -> float:
    """Estimate the share of ``ranks`` times one device's speed that is left."""
    world = found["ranks"]
    rate = 300e9 if world <= 8 else 40e9
    reduce = 2 * (world - 1) / world * adapter_bytes / rate + 2 * (world - 1) * 20e-6
    whole = step_seconds * found["budget_used"]
    return float(whole / (whole * found["load"] + reduce))


def check_counts(chosen: argparse.Namespace, pairs: int) -> None:
    """Refuse numbers with which nothing can be dealt.

    Raises:
        AlignkitError: One is too small or too large.
    """
    for name in ("grow", "tokens_per_batch"):
        if getattr(chosen, name) < 1:
            raise AlignkitError(f"--{name.replace('_', '-')}: must be 1 or more")
    if not all(1 <= world <= pairs * chosen.grow for world in chosen.ranks):
        raise AlignkitError(f"--ranks: must be from 1 to the {pairs * chosen.grow} pairs")


def main() -> int:
    """Simulate, print a table, write the numbers; status 1 if a load is above the goal."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--lengths", type=Path, default=LENGTHS, metavar="FILE")
    flags.add_argument("--tokens-per-batch", type=int, default=4096)
    flags.add_argument("--grow", type=int, default=10)
    flags.add_argument("--ranks", type=int, nargs="+", default=WORLDS)
    flags.add_argument("--step-seconds", type=float, help="of a full micro-batch on one device")
    flags.add_argument("--adapter-mib", type=float, default=16.0, help="fp32 gradients")
    flags.add_argument("--json", type=Path, metavar="FILE")
    chosen = flags.parse_args()
    try:
        pairs = read_lengths(str(chosen.lengths))
        check_counts(chosen, len(pairs))
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lengths = np.tile(np.array([sum(pair) for pair in pairs], np.int64), chosen.grow)
    print(f"{len(lengths):,} pairs, {lengths.sum():,} tokens, rows of {chosen.tokens_per_batch}")
    table = []
    for world in chosen.ranks:
        found = balance(lengths, chosen.tokens_per_batch, world)
        if chosen.step_seconds:
            bytes_ = chosen.adapter_mib * 2**20
            found["efficiency"] = efficiency(found, chosen.step_seconds, bytes_)
        table.append(found)
        print(
            f"{world:4} ranks: load {found['load']:.4f} (worst step {found['worst_step']:.4f}), "
            f"{found['budget_used']:.1%} of the budget, {found['steps']} steps, planned in "
            f"{found['planning_seconds']:.1f} s"
            + (f", efficiency {found['efficiency']:.1%}" if "efficiency" in found else "")
        )
    if chosen.json:
        write_atomically(chosen.json, json.dumps(table, indent=1) + "\n")
    return 0 if all(each["load"] <= GOAL for each in table) else 1


if __name__ == "__main__":
    sys.exit(main())
