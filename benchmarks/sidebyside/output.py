"""The table, the picture and the file of numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from alignkit.tools.plots import COLORS, new_figure, save
from alignkit.utils.atomic import write_atomically


def print_parity(console: Console, verdict: Mapping[str, Any]) -> None:
    """Say how far the arms are apart, and whether that will do."""
    fp32 = verdict["fp32"]
    table = Table(title="parity: the same computation?")
    for header in ("", "log-probs", "losses"):
        table.add_column(header, justify="left" if not header else "right")
    table.add_row(
        "alignkit against the peer, fp32, largest relative difference",
        f"{fp32['logps_max_relative']:.1e}",
        f"{fp32['losses_max_relative']:.1e}",
    )
    for arm, errors in verdict["bf16"].items():
        table.add_row(
            f"{arm}, bf16, RMS error against fp32",
            f"{errors['logps_rms_error']:.1e}",
            f"{errors['losses_rms_error']:.1e}",
        )
    console.print(table)
    for failure in verdict["failures"]:
        console.print(f"[bold red]not the same:[/] {failure}")


def print_arms(
    console: Console, arms: Mapping[str, Any], ratios: Mapping[str, float], unit: str
) -> None:
    """Print each arm's numbers, and how alignkit stands to it on the same steps."""
    table = Table(title="medians over rounds; alignkit beside each arm, least and most")
    table.add_column("arm")
    for header in (
        f"{unit}/s",
        "of the matmul ceiling",
        "× the FLOP floor",
        "GiB above the model",
        "alignkit's speed",
        "alignkit's peak",
    ):
        table.add_column(header, justify="right")
    for name, arm in arms.items():
        table.add_row(
            name,
            f"{arm[f'{unit}_per_second']:.2f}",
            f"{arm['flop_utilisation']:.0%}",
            f"{arm['times_the_flop_floor']:.1f}",
            f"{arm['peak_bytes_above_loaded'] / 2**30:.2f}",
            *(_beside(arm, key) for key in ("speed", "peak")),
        )
    console.print(table)
    for name, value in ratios.items():
        console.print(f"{name} = {value:.2f}", highlight=False)


def _beside(arm: Mapping[str, Any], what: str) -> str:
    low_high = arm.get(f"alignkit_{what}_range")
    return "× {:.2f} … {:.2f}".format(*low_high) if low_high else ""


def print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    """Say where it was."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = machine["gpu"] or machine["cpu"]
    console.print(
        f"{where}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['ram_gib']} GiB; {machine['matmul_dtype']} matmul "
        f"{machine['matmul_flops'] / 1e9:,.0f} GFLOP/s; {versions}",
        style="dim",
        highlight=False,
    )


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write every number, if a file was asked for."""
    if path is not None:
        write_atomically(path, json.dumps(values, indent=2) + "\n")


def draw_arms(path: Path | None, arms: Mapping[str, Any], unit: str) -> None:
    """Draw throughput and peak memory as bars, if a file was asked for."""
    if path is None:
        return
    figure, (left, right) = new_figure(2)
    names = list(arms)
    colors = [COLORS[0 if name.startswith("alignkit") else 1] for name in names]
    panels = (
        (left, f"{unit} per second", [arms[name][f"{unit}_per_second"] for name in names]),
        (
            right,
            "peak memory above the model (GiB)",
            [arms[name]["peak_bytes_above_loaded"] / 2**30 for name in names],
        ),
    )
    for axis, title, values in panels:
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(title)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(values))
    save(figure, path)


class Line(NamedTuple):
    """One panel: a cost over a size, both from zero so that flat looks flat."""

    size: str
    cost: str
    points: list[tuple[float, float]]


def draw_lines(path: Path | None, lines: Sequence[Line]) -> None:
    """Draw one panel a line, if a file was asked for."""
    if path is None:
        return
    figure, axes = new_figure(len(lines))
    for axis, line in zip(axes, lines, strict=True):
        axis.plot(*zip(*line.points, strict=True), marker="o", color=COLORS[0])
        axis.set(xlabel=line.size, ylabel=line.cost, ylim=(0, 1.2 * max(y for _, y in line.points)))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")  # 256 rather than 2⁸
    save(figure, path)


def command() -> list[str]:
    """What was typed, for the record."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
