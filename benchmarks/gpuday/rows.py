"""DPO's bare step in rows of growing length: speed against memory, for the choice between them.

Peers take a few pairs a micro-batch, and their memory belongs to those; alignkit's belongs to the
tokens of a row, which ``tokens_per_batch`` sets.
"""

from __future__ import annotations

from statistics import median

import torch
from sidebyside.job import Task

from alignkit.engine import Example, collate
from gpuday import bare
from gpuday.clock import peak_above, seconds
from gpuday.day import Day

_TASK: Task = "dpo"
_ROWS = 3
"""Rows of each length, one after another."""


def measure(day: Day) -> None:
    """Note speed and memory at every length, with activations kept and computed again."""
    for shape in day.sizes.shapes:
        for checkpointing in (False, True):
            label = f"{shape}{', checkpointing' if checkpointing else ''}"
            if day.has(f"{label}: whole"):
                continue
            if day.is_late():
                raise TimeoutError(f"no time was left for {label}")
            module = bare.build(day, _TASK, shape, activation_checkpointing=checkpointing)
            for budget in day.sizes.rows:
                _at(day, module, shape, label, budget)
                bare.free(day)
            del module
            bare.free(day)
            day.note(f"{label}: whole", True, "")


def _at(day: Day, module: bare.AlignmentModule, shape: str, label: str, budget: int) -> None:
    rows = rows_of(day.examples(_TASK, shape, 4 * budget // 50), budget)
    tokens = sum(example.num_tokens for row in rows for example in row) / len(rows)
    about = {"row_tokens": tokens, "pairs": len(rows[0]), "task": _TASK, "trainer": "none"}
    name = f"{label}: rows of {budget}"
    try:
        step = bare.Step(module, [collate(row).to(day.device) for row in rows])
        for _ in rows:
            step()
        peak = peak_above(step, day.device)
        times = [seconds(step, day.device, len(rows)) for _ in range(day.sizes.rounds)]
    except torch.OutOfMemoryError as error:
        module.zero_grad()
        day.note(f"{name}: out of memory", str(error)[:300], "", **about)
        return
    day.note(f"{name}: peak above the model", peak / 2**30, "GiB", **about)
    day.note(f"{name}: tokens", tokens / median(times), "tokens/s", rounds=times, **about)
    flops = bare.flops_of(_TASK, shape, [example for row in rows for example in row]) / len(rows)
    used = flops / (median(times) * day.ceiling())
    day.note(f"{name}: MFU of useful tokens", used, "of the ceiling", **about)


def rows_of(examples: list[Example], budget: int) -> list[list[Example]]:
    """The examples in order, as many in each row as its budget holds."""
    rows: list[list[Example]] = [[]]
    filled = 0
    for example in examples:
        if rows[-1] and filled + example.num_tokens > budget:
            if len(rows) == _ROWS:
                break
            rows.append([])
            filled = 0
        rows[-1].append(example)
        filled += example.num_tokens
    return rows
