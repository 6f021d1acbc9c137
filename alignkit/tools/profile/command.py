"""Run ``alignkit profile``, which measures LoRA against full fine-tuning on this machine."""

from __future__ import annotations

import json as jsonlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.tools.generate.request import as_json, resolve_device
from alignkit.tools.plots import save
from alignkit.tools.profile.config import read_training_config
from alignkit.tools.profile.result import NAMES, PARTS, Profile, draw
from alignkit.tools.profile.step import Measurement, Setup
from alignkit.utils.atomic import check_outputs, write_atomically

Precision = Literal["32-true", "bf16-mixed"]
_DEFAULTS = {
    "base": None,
    "lora": LoRAConfig(),
    "random_init": False,
    "precision": "bf16-mixed",
    "tokens": 256,
}


def profile(
    base: str | None = None,
    *,
    config: str | None = None,
    lora: LoRAConfig | None = None,
    random_init: bool | None = None,
    precision: Precision | None = None,
    tokens: int | None = None,
    rows: int = 4,
    steps: int = 10,
    rounds: int = 3,
    device: str = "auto",
    markdown: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> Profile:
    """Compare full fine-tuning with LoRA: parameters, times and peak memory of a training step.

    Each setup runs in processes of its own, so that neither measures the other's memory. They take
    turns (full, LoRA, LoRA, full, …), so that a machine that slows down affects both.

    Args:
        base: The model: a Hub id, a directory, a GGUF file, or with random_init a config.
        config: A training YAML: base, lora, random_init, precision and tokens (its block_size)
            are taken from it unless they are given.
        lora: The adapter's whole configuration.
        random_init: Draw the base's weights at random, which costs the same.
        precision: bf16-mixed (the default) trains fp32 weights under bf16 autocast, and keeps
            LoRA's frozen base in bf16; 32-true is fp32 throughout.
        tokens: Tokens in a document, drawn at random; 256 by default.
        rows: Documents in a step.
        steps: Measured steps in each process, after two to warm up.
        rounds: Processes for each setup.
        device: Such as cpu or cuda:0; auto takes a GPU if there is one.
        markdown: A file for the table.
        json: A file for every number.
        plot: A file for a bar chart.

    Returns:
        Both setups and their ratios.

    Raises:
        AlignkitError: A bad option or path, before anything is computed; or a setup that failed.
    """
    table_file, json_file, plot_file = check_outputs(
        {"--markdown": markdown, "--json": json, "--plot": plot}
    )
    given = {
        "base": base,
        "lora": lora,
        "random_init": random_init,
        "precision": precision,
        "tokens": tokens,
    }
    chosen = {
        **_DEFAULTS,
        **(read_training_config(config) if config is not None else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    _check_choice({**chosen, "rows": rows, "steps": steps, "rounds": rounds})
    target = resolve_device(device)
    full = Setup(
        base=chosen["base"],
        lora=None,
        random_init=chosen["random_init"],
        mixed=chosen["precision"] == "bf16-mixed",
        rows=rows,
        tokens=chosen["tokens"],
        steps=steps,
        device=str(target),
    )
    setups = {"full": full, "lora": replace(full, lora=chosen["lora"].to_dict())}
    console = Console()
    found = _run_rounds(setups, rounds, console)
    result = Profile(
        settings={
            "precision": chosen["precision"],
            "rounds": rounds,
            **asdict(setups["lora"]),
        },
        machine=_machine(target),
        setups={name: _median(runs) for name, runs in found.items()},
        ratios=_ratios(found),
    )
    if table_file is not None:
        write_atomically(table_file, result.to_markdown())
    if json_file is not None:
        write_atomically(json_file, as_json(result.to_dict()))
    if plot_file is not None:
        save(draw(result), plot_file)
    console.print(result.to_table(), result.caption(), sep="\n", markup=False)
    return result


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `profile`, which takes what ``parser`` returns as keyword arguments."""
    parser.add_function_arguments(profile)


def _check_choice(chosen: Mapping[str, Any]) -> None:
    if not chosen["base"]:
        raise AlignkitError("base: none was given; pass --base MODEL or --config FILE")
    if chosen["precision"] not in get_args(Precision):
        raise AlignkitError(
            f"precision: {chosen['precision']} is not profiled; "
            f"pass --precision {' or '.join(get_args(Precision))}"
        )
    for name, least in (("rows", 1), ("steps", 1), ("rounds", 1), ("tokens", 2)):
        if chosen[name] < least:
            raise AlignkitError(f"{name}: must be {least} or more, got {chosen[name]}")


def _run_rounds(
    setups: Mapping[str, Setup], rounds: int, console: Console
) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {name: [] for name in setups}
    for turn in range(rounds):
        order = list(setups) if turn % 2 == 0 else list(setups)[::-1]
        for name in order:
            with console.status(f"{NAMES[name]}, process {turn + 1} of {rounds}"):
                found[name].append(_run_process(name, setups[name]))
    return found


def _run_process(name: str, setup: Setup) -> Measurement:
    process = subprocess.run(
        [sys.executable, "-m", "alignkit.tools.profile.step"],
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
        raise AlignkitError(f"profile: {NAMES[name]} failed ({reason}); try fewer rows or tokens")
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
        for part in (*PARTS, "step")
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
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
