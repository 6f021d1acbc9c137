"""From turns to numbers: medians of paired ratios, their spread, and the distance to the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from sidebyside.experiment import Outcome, Round
from sidebyside.plan import OURS
from sidebyside.runner import Taken

Ratio = Callable[[Round], float]


def speed(turns: Round) -> float:
    """How many times faster alignkit went through the same examples."""
    return turns.peer.seconds / turns.ours.seconds


def step(turns: Round) -> float:
    """alignkit's time for a step, as a share of the peer's."""
    return turns.ours.seconds / turns.peer.seconds


def peak(turns: Round) -> float:
    """alignkit's peak memory above the loaded model, as a share of the peer's."""
    return turns.ours.peak_bytes / turns.peer.peak_bytes


def ratios(outcome: Outcome, wanted: Mapping[str, tuple[str, Ratio]]) -> dict[str, float]:
    """Medians over rounds of the ratio within a round.

    Args:
        outcome: A comparison's; where parity failed there are no ratios.
        wanted: A name to the peer and the ratio it stands for.
    """
    return {
        name: median(ratio(each) for each in outcome.rounds[peer])
        for name, (peer, ratio) in wanted.items()
        if peer in outcome.rounds
    }


def arms(outcome: Outcome, unit: str) -> dict[str, Any]:
    """Each arm's own numbers: medians over its turns, and every turn beside alignkit's.

    Args:
        outcome: A comparison's; where parity failed nobody was timed.
        unit: What an example is called.
    """
    if not outcome.rounds:
        return {}
    ours = [
        (each.ours, flops)
        for peer, rounds in outcome.rounds.items()
        for each, (flops, _) in zip(rounds, outcome.flops[peer], strict=True)
    ]
    found = {OURS: _arm(outcome, unit, OURS, ours)}
    for peer, rounds in outcome.rounds.items():
        theirs = [
            (each.peer, flops) for each, (_, flops) in zip(rounds, outcome.flops[peer], strict=True)
        ]
        found[peer] = _arm(outcome, unit, peer, theirs) | {
            "alignkit_speed_range": _range([speed(each) for each in rounds]),
            "alignkit_peak_range": _range([peak(each) for each in rounds]),
            "rounds": [
                {
                    "seconds": each.peer.seconds,
                    "alignkit_seconds": each.ours.seconds,
                    "peak_bytes": each.peer.peak_bytes,
                    "alignkit_peak_bytes": each.ours.peak_bytes,
                }
                for each in rounds
            ],
        }
    return found


def _arm(
    outcome: Outcome, unit: str, name: str, turns: Sequence[tuple[Taken, float]]
) -> dict[str, Any]:
    # By each turn's own steps, whose sizes differ: FLOPs over what the machine could have done.
    use = median(flops / (taken.seconds * outcome.ceiling) for taken, flops in turns)
    return {
        f"{unit}_per_second": median(
            outcome.examples_per_turn / taken.seconds for taken, _ in turns
        ),
        "flop_utilisation": use,
        "times_the_flop_floor": 1 / use,
        "peak_bytes_above_loaded": max(taken.peak_bytes for taken, _ in turns),
        "loaded_bytes": outcome.loaded_bytes[name],
    }


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]
