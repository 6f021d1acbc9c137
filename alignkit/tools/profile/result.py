"""Show the profile's numbers as a table, as Markdown and as bars."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from alignkit.tools.plots import COLORS, new_figure
from alignkit.tools.profile.step import Measurement

NAMES = {"full": "Full fine-tuning", "lora": "LoRA"}
PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Hold the measurements of both setups, medians over their processes, and their ratios.

    Example:
        >>> full = Measurement(1000, 1000, 0.2, 0.4, 0.1, 0.7, peak_bytes=2**21)
        >>> lora = Measurement(1000, 10, 0.2, 0.2, 0.0, 0.4, peak_bytes=2**20)
        >>> ratios = {"forward": 1.0, "backward": 0.5, "optimizer": 0.0, "step": 0.57, "peak": 0.5}
        >>> Profile({}, {}, {"full": full, "lora": lora}, ratios).rows()[1]
        ['trainable parameters', '1,000', '10', '0.0100']

    Attributes:
        settings: The arguments of the run.
        machine: The device and the versions it ran with.
        setups: The measurements of ``full`` and ``lora``.
        ratios: LoRA over full fine-tuning for forward, backward, optimizer, step and peak: the
            median over rounds of the ratio within a round.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    setups: dict[str, Measurement]
    ratios: dict[str, float]

    def rows(self) -> list[list[str]]:
        """Return the table's cells, row by row, with the header first."""
        header = ["", *NAMES.values(), "ratio"]
        full, lora = self.setups["full"], self.setups["lora"]
        trained = lora.trainable_parameters / full.trainable_parameters
        rows = [
            [
                "trainable parameters",
                f"{full.trainable_parameters:,}",
                f"{lora.trainable_parameters:,}",
                f"{trained:.4f}",
            ]
        ]
        for part in (*PARTS, "step"):
            values = [f"{1000 * getattr(setup, part):.1f}" for setup in (full, lora)]
            rows.append([f"{part} (ms)", *values, f"{self.ratios[part]:.2f}"])
        peaks = [f"{setup.peak_bytes / 2**20:,.0f}" for setup in (full, lora)]
        return [header, *rows, ["peak memory (MiB)", *peaks, f"{self.ratios['peak']:.2f}"]]

    def caption(self) -> str:
        """Return one line that says what was measured and where."""
        run, here = self.settings, self.machine
        return (
            f"{run['base']} ({self.setups['full'].base_parameters:,} parameters), "
            f"{run['rows']} × {run['tokens']} tokens a step, {run['precision']}, "
            f"medians of {run['steps']} steps in each of {run['rounds']} processes; "
            f"{here['device']}, {here['threads']} threads, torch {here['torch']}."
        )

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        header, *rows = self.rows()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
            f"\n\n{self.caption()}\n"
        )

    def to_table(self) -> Table:
        """Return the same table for the terminal."""
        header, *rows = self.rows()
        table = Table()
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)


def draw(result: Profile) -> Figure:
    """Return a figure of step time by part, peak memory and trainable parameters as bars."""
    figure, (time, memory, parameters) = new_figure(3)
    names = list(NAMES.values())
    setups = [result.setups[name] for name in NAMES]
    below = [0.0, 0.0]
    for part, color in zip(PARTS, COLORS, strict=False):
        values = [1000 * getattr(setup, part) for setup in setups]
        time.bar(names, values, bottom=below, color=color, label=part, width=0.6)
        below = [a + b for a, b in zip(below, values, strict=True)]
    time.legend()
    time.set(title=f"step: × {result.ratios['step']:.2f}", ylabel="ms")
    peaks = [setup.peak_bytes / 2**20 for setup in setups]
    bars = memory.bar(names, peaks, color=COLORS[3], width=0.6)
    memory.bar_label(bars, fmt="{:,.0f}", padding=2)
    memory.set(title=f"peak memory: × {result.ratios['peak']:.2f}", ylabel="MiB")
    counts = [setup.trainable_parameters for setup in setups]
    bars = parameters.bar(names, [n / 1e6 for n in counts], color=COLORS[4], width=0.6)
    parameters.bar_label(bars, labels=[f"{n:,}" for n in counts], padding=2)
    parameters.set(title="trainable parameters", ylabel="millions")
    for axis in (time, memory, parameters):
        axis.margins(y=0.1)
        axis.grid(visible=False, axis="x")
    return figure
