"""``alignkit profile``: what LoRA saves over full fine-tuning, measured on this machine."""

from __future__ import annotations

import json as jsonlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.report.files import check_output, write_file, write_text
from alignkit.report.plots import COLORS, new_figure, save
from alignkit.report.profile_step import Measurement, Setup
from alignkit.report.request import as_json, resolve_device

_NAMES = {"full": "Full fine-tuning", "lora": "LoRA"}
_PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Both setups, each the median of its processes, and their ratios.

    Attributes:
        settings: What was run.
        machine: Where.
        setups: ``full`` and ``lora``.
        ratios: LoRA over full fine-tuning for forward, backward, optimizer, step and peak: the
            median over rounds of the ratio within a round.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    setups: dict[str, Measurement]
    ratios: dict[str, float]

    def rows(self) -> list[list[str]]:
        """The table's cells, header first."""
        header = ["", *_NAMES.values(), "ratio"]
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
        for part in (*_PARTS, "step"):
            values = [f"{1000 * getattr(setup, part):.1f}" for setup in (full, lora)]
            rows.append([f"{part} (ms)", *values, f"{self.ratios[part]:.2f}"])
        peaks = [f"{setup.peak_bytes / 2**20:,.0f}" for setup in (full, lora)]
        return [header, *rows, ["peak memory (MiB)", *peaks, f"{self.ratios['peak']:.2f}"]]

    def caption(self) -> str:
        """One line that says what was measured and where."""
        run, here = self.settings, self.machine
        return (
            f"{run['base']} ({self.setups['full'].base_parameters:,} parameters), "
            f"{run['rows']} × {run['tokens']} tokens a step, {run['precision']}, "
            f"medians of {run['steps']} steps in each of {run['rounds']} processes; "
            f"{here['device']}, {here['threads']} threads, torch {here['torch']}."
        )

    def to_markdown(self) -> str:
        """The table and its caption."""
        header, *rows = self.rows()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
            f"\n\n{self.caption()}\n"
        )

    def to_table(self) -> Table:
        """The same table for the terminal."""
        header, *rows = self.rows()
        table = Table()
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def profile(
    base: str,
    *,
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 (frozen)
    random_init: bool = False,
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed",
    rows: int = 4,
    tokens: int = 256,
    steps: int = 10,
    rounds: int = 3,
    device: str = "auto",
    markdown: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> Profile:
    """Compare full fine-tuning with LoRA: parameters, times and peak memory of a training step.

    Each setup runs in processes of its own, in turns (full, LoRA, LoRA, full, …), so that neither
    sees the other's memory and a machine that slows down slows both.

    Args:
        base: The model: a Hub id, a directory, a GGUF file, or with random_init a config.
        lora: The adapter to compare with.
        random_init: Draw the base's weights at random; costs are the same.
        precision: bf16-mixed trains fp32 weights under bf16 autocast, and keeps LoRA's frozen base
            in bf16; 32-true is fp32 throughout.
        rows: Documents a step.
        tokens: Tokens a document, drawn at random.
        steps: Measured steps in each process, after two to warm up.
        rounds: Processes a setup.
        device: Such as cpu or cuda:0; auto takes a GPU where there is one.
        markdown: A file for the table.
        json: A file for every number.
        plot: A file for a bar chart.

    Returns:
        Both setups and their ratios.

    Raises:
        AlignkitError: A bad option or path, before anything is computed; or a setup that failed.
    """
    files = {
        name: check_output(path, name)
        for name, path in (("markdown", markdown), ("json", json), ("plot", plot))
    }
    for name, value in (("rows", rows), ("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise AlignkitError(f"{name}: must be 1 or more, got {value}")
    if tokens < 2:
        raise AlignkitError(f"tokens: must be 2 or more (the first is not scored), got {tokens}")
    target = resolve_device(device)
    common = Setup(
        base, None, random_init, precision == "bf16-mixed", rows, tokens, steps, str(target)
    )
    setups = {"full": common, "lora": Setup(**{**asdict(common), "lora": lora.to_dict()})}
    console = Console()
    found = _run_rounds(setups, rounds, console)
    result = Profile(
        settings={"precision": precision, "rounds": rounds, **asdict(setups["lora"])},
        machine=_machine(target),
        setups={name: _median(runs) for name, runs in found.items()},
        ratios=_ratios(found),
    )
    console.print(result.to_table(), result.caption(), sep="\n", markup=False)
    if files["markdown"] is not None:
        write_text(files["markdown"], result.to_markdown())
    if files["json"] is not None:
        write_text(files["json"], as_json(result.to_dict()))
    if files["plot"] is not None:
        figure = draw(result)
        write_file(files["plot"], lambda path: save(figure, path))
    return result


def _run_rounds(
    setups: Mapping[str, Setup], rounds: int, console: Console
) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {name: [] for name in setups}
    for turn in range(rounds):
        order = list(setups) if turn % 2 == 0 else list(setups)[::-1]
        for name in order:
            with console.status(f"{_NAMES[name]}, process {turn + 1} of {rounds}"):
                found[name].append(_run_process(name, setups[name]))
    return found


def _run_process(name: str, setup: Setup) -> Measurement:
    process = subprocess.run(
        [sys.executable, "-m", "alignkit.report.profile_step"],
        input=jsonlib.dumps(asdict(setup)),
        capture_output=True,
        text=True,
    )
    lines = process.stdout.strip().splitlines()
    answer: dict[str, Any] = {}
    if process.returncode in (0, 2) and lines:
        answer = jsonlib.loads(lines[-1])
    if "error" in answer:
        raise AlignkitError(answer["error"])
    if not answer:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        reason = "killed, likely out of memory" if process.returncode < 0 else last
        raise AlignkitError(f"profile: {_NAMES[name]} failed ({reason}); try fewer rows or tokens")
    return Measurement(**answer)


def _median(runs: Sequence[Measurement]) -> Measurement:
    columns = {key: [asdict(run)[key] for run in runs] for key in asdict(runs[0])}
    whole = ("base_parameters", "trainable_parameters", "peak_bytes")
    values = {key: median(column) for key, column in columns.items()}
    return Measurement(**{k: int(v) if k in whole else v for k, v in values.items()})


def _ratios(found: Mapping[str, Sequence[Measurement]]) -> dict[str, float]:
    pairs = list(zip(found["lora"], found["full"], strict=True))
    ratios = {
        part: median(getattr(lora, part) / getattr(full, part) for lora, full in pairs)
        for part in (*_PARTS, "step")
    }
    ratios["peak"] = median(lora.peak_bytes / full.peak_bytes for lora, full in pairs)
    return ratios


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(result: Profile) -> Figure:
    """Draw step time by part, peak memory and trainable parameters as bars."""
    figure, (time, memory, parameters) = new_figure(3)
    names = list(_NAMES.values())
    setups = [result.setups[name] for name in _NAMES]
    below = [0.0, 0.0]
    for part, color in zip(_PARTS, COLORS, strict=False):
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
