"""How alignkit's cost grows: pairs per step, row length, and a model of 1.4 billion parameters.

    python benchmarks/scaling.py --model DIR --data HH_DIR --json scaling.json --plot scaling.png
    python benchmarks/scaling.py --pythia --json pythia.json

Two curves of DPO steps. More pairs per step at a fixed token budget: the time of a pair and the
peak memory should both stay flat, since a larger step is only more micro-batches. Longer rows of
the same short pairs: fewer, larger micro-batches. ``--pythia`` takes DPO steps of a Pythia-1.4b
shape in bf16 and reports the whole process's peak.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sidebyside import machine, options, output
from sidebyside.arm_alignkit import micro_batches as dealt
from sidebyside.examples import draw
from sidebyside.job import Arm, Job
from sidebyside.plan import OURS, our_micro_batches
from sidebyside.runner import Worker
from sidebyside.script import measure
from sidebyside.setup import Shared, prepare, write_examples

from alignkit.engine import Example
from alignkit.utils.memory import peak_bytes

_PYTHIA = "pythia-1.4b-shape"
_SAME_PAIRS = 64  # points with fewer pairs a step go through these, in several steps
_SHORT = 256  # pairs of the second curve are at most this long, so that rows come out full


@dataclass(frozen=True)
class Growth(options.Common):
    """What this script is told.

    Attributes:
        most_pairs: The first curve ends here.
        longest_row: The second curve ends here.
        pythia: Take steps of the large shape instead.
    """

    most_pairs: int
    longest_row: int
    pythia: bool


class Points:
    """Measures single points, each in a process of its own."""

    def __init__(self, chosen: Growth, shared: Shared, work: Path, console: Console) -> None:
        self.chosen, self.shared, self.work, self.console = chosen, shared, work, console

    def measure(self, examples: list[Example], per_step: int, budget: int) -> dict[str, Any]:
        """Go through the examples, after a small step to warm up.

        Args:
            examples: Pairs.
            per_step: Of an optimizer step.
            budget: Tokens of a micro-batch.
        """
        indices = list(range(len(examples)))
        steps = [indices[start : start + per_step] for start in range(0, len(indices), per_step)]
        micro_batches = our_micro_batches(steps, examples, budget)
        rounds = self.chosen.rounds
        warm_up = steps[0][: max(8, micro_batches)]
        job = Job(
            arm=Arm(OURS, "alignkit").in_precision(self.chosen.precision),
            task="dpo",
            model=self.shared.model,
            tokenizer=self.shared.tokenizer,
            adapter=self.shared.adapter,
            lora=self.shared.lora.to_dict(),
            examples=write_examples(examples, self.work / "examples.json"),
            scored=[],
            steps=[warm_up] + steps * rounds,
            micro_batches=micro_batches,
            device=self.chosen.device,
        )
        status = f"{per_step} pairs a step, rows of {budget} tokens"
        with (
            self.console.status(status),
            Worker(job, self.work / "alignkit.log") as worker,
        ):
            worker.ready().take(1)
            taken = [worker.take(len(steps)) for _ in range(rounds)]
        lengths = [example.num_tokens for example in examples]
        tokens = sum(lengths)
        rows = [sum(lengths[index] for index in row) for row in dealt(job, examples)]
        seconds = median(turn.seconds for turn in taken)
        return {
            "pairs_per_step": per_step,
            "tokens_per_batch": budget,
            "mean_row_tokens": tokens / (len(steps) * micro_batches),
            "longest_row_tokens": max(rows),
            "seconds_per_pair": seconds / len(examples),
            "microseconds_per_token": 1e6 * seconds / tokens,
            "peak_bytes_above_loaded": max(turn.peak_bytes for turn in taken),
            "peak_bytes": max(turn.total_bytes for turn in taken),
        }


def curves(points: Points, chosen: Growth, vocabulary: int) -> dict[str, list[dict[str, Any]]]:
    """Both curves, from 8 pairs a step and from rows of 256 tokens up, doubling."""
    most = max(chosen.most_pairs, _SAME_PAIRS)
    found = draw("dpo", 4 * most, chosen, points.shared.tokenizer, vocabulary)
    short = [example for example in found if example.num_tokens <= _SHORT][: min(most, _SAME_PAIRS)]
    return {
        "pairs_per_step": [
            points.measure(
                found[: max(count, min(most, _SAME_PAIRS))], count, chosen.tokens_per_batch
            )
            for count in _doubling(8, chosen.most_pairs)
        ],
        "row_tokens": [
            points.measure(short, len(short), length)
            for length in _doubling(_SHORT, chosen.longest_row)
        ],
    }


def _doubling(first: int, last: int) -> list[int]:
    values = [first]
    while 2 * values[-1] <= last:
        values.append(2 * values[-1])
    return values


def show(console: Console, title: str, points: list[dict[str, Any]]) -> None:
    """Print one curve."""
    table = Table(title=title)
    for header in (
        "pairs a step", "mean row", "longest", "s/pair", "µs/token", "GiB above the model", "GiB",
    ):  # fmt: skip
        table.add_column(header, justify="right")
    for point in points:
        table.add_row(
            str(point["pairs_per_step"]),
            f"{point['mean_row_tokens']:.0f}",
            str(point["longest_row_tokens"]),
            f"{point['seconds_per_pair']:.4f}",
            f"{point['microseconds_per_token']:.1f}",
            f"{point['peak_bytes_above_loaded'] / 2**30:.2f}",
            f"{point['peak_bytes'] / 2**30:.2f}",
        )
    console.print(table)


def draw_curves(path: Path | None, found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw time and memory over both sizes, if a file was asked for."""
    panels = [
        ("pairs_per_step", "pairs_per_step", "pairs per step", "seconds_per_pair", "s per pair"),
        (
            "row_tokens",
            "mean_row_tokens",
            "tokens in a row",
            "microseconds_per_token",
            "µs per token",
        ),
    ]
    output.draw_lines(
        path,
        [
            panel
            for curve, size, size_label, cost, cost_label in panels
            for panel in (
                output.Line(size_label, cost_label, [(p[size], p[cost]) for p in found[curve]]),
                output.Line(
                    size_label,
                    "peak memory above the model (GiB)",
                    [(p[size], p["peak_bytes_above_loaded"] / 2**30) for p in found[curve]],
                ),
            )
        ],
    )


def parse() -> Growth:
    """Read the command line."""
    flags = options.common_parser("How the cost of alignkit's DPO steps grows.", rounds=1)
    flags.add_argument("--most-pairs", type=int, default=256, help="of a step")
    flags.add_argument("--longest-row", type=int, default=4096, help="tokens")
    flags.add_argument(
        "--pythia", action=argparse.BooleanOptionalAction, default=False,
        help=f"steps of a {_PYTHIA} instead, with the peak of the whole process",
    )  # fmt: skip
    values = flags.parse_args()
    device = options.resolve_device(values.device)
    defaults = dict(options.COMMON_DEFAULTS[device])
    if values.pythia:
        defaults |= {"model": _PYTHIA, "tokens_per_batch": 2048}
    return Growth(**options.fill_in(values, device, defaults))


def run(chosen: Growth, console: Console, work: Path) -> dict[str, Any]:
    """Measure, print and draw; returns what is written to the file of numbers."""
    with console.status("model and adapter"):
        shared = prepare(chosen, work)
    created = peak_bytes(torch.device("cpu"))
    points = Points(chosen, shared, work, console)
    vocabulary = shared.config.vocab_size
    if chosen.pythia:
        pairs = draw("dpo", 8, chosen, shared.tokenizer, vocabulary)
        found = {"pythia": [points.measure(pairs, 8, chosen.tokens_per_batch)]}
        console.print(f"peak while the model was made: {created / 2**30:.1f} GiB")
    else:
        found = curves(points, chosen, vocabulary)
        draw_curves(chosen.plot, found)
    for title, curve in found.items():
        show(console, title, curve)
    where = machine.describe(chosen.device) | {"model": chosen.model, "command": output.command()}
    return {"curves": found, "creation_peak_bytes": created, "machine": where}


if __name__ == "__main__":
    sys.exit(measure(parse, run))
