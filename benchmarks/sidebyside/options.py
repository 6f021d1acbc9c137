"""The command line that the scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import check_output
from sidebyside.job import Precision, Task
from sidebyside.shapes import SHAPES

UNITS: dict[Task, str] = {"dpo": "pairs", "sft": "samples", "lm": "rows"}
# Sizes that keep a run under ten minutes, by device.
COMMON_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "smollm2-135m-shape", "tokens_per_batch": 4096},
    "cuda": {"model": "gpt2-shape", "tokens_per_batch": 16384},
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"per_step": 8, "steps": 1},
    "cuda": {"per_step": 64, "steps": 2},
}
_LM_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "gpt2-shape", "per_step": 4, "steps": 2},
    "cuda": {"model": "gpt2-shape", "per_step": 32, "steps": 5},
}


@dataclass(frozen=True)
class Common:
    """What every script is told, everything filled in.

    Attributes:
        model: A shape with random weights, a directory, a GGUF file or a Hub id.
        tokenizer: For ``data``, where the model brings none.
        data: Real rows; synthetic ones of HH-RLHF's lengths otherwise.
        lengths: A file of token counts, which synthetic rows take; see `lengths`.
        rounds: How often everything is measured.
        tokens_per_batch: Most tokens of one of alignkit's micro-batches.
        device: ``cpu`` or ``cuda``.
        precision: Of all arms; a CPU without bf16 instructions takes minutes for such a product.
        seed: Of everything that is drawn.
        plot: A file for the picture.
        json: A file for the numbers.
    """

    model: str
    tokenizer: str | None
    data: str | None
    lengths: str | None
    rounds: int
    tokens_per_batch: int
    device: str
    precision: Precision
    seed: int
    plot: Path | None
    json: Path | None

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Return what alignkit keeps a base's weights in."""
        return "float32" if self.precision == "32-true" else "bfloat16"


@dataclass(frozen=True)
class Options(Common):
    """What a comparison is told.

    Attributes:
        per_step: Examples of one optimizer step (pairs, samples or rows).
        steps: Optimizer steps of a turn.
        peer_batch: Most examples of one of the peers' micro-batches.
        tokens: Tokens of a row, in language modelling.
        parity_steps: Optimizer steps by which parity is judged. A peer takes a micro-batch for
            every example of one, which on a GPU costs as much as a large micro-batch.
        perturb: An arm whose adapter is disturbed, to see the parity gate refuse.
    """

    per_step: int
    steps: int
    peer_batch: int
    tokens: int
    parity_steps: int
    perturb: str | None


def common_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The flags of every script."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = flags.add_argument
    add("--model", help=f"directory, .gguf file, Hub id, or random weights: {', '.join(SHAPES)}")
    add("--tokenizer", help="for --data, where the model brings none")
    add("--data", help="directory or file of rows; synthetic token ids where absent")
    add("--lengths", metavar="FILE", help="token counts of real pairs, for synthetic token ids")
    add("--rounds", type=int, default=rounds, help="how often everything is measured")
    add("--tokens-per-batch", type=int, help="most tokens of one of alignkit's micro-batches")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=get_args(Precision), default="bf16-mixed", help="of all arms")
    add("--seed", type=int, default=0)
    add("--plot", metavar="FILE", help="write a picture")
    add("--json", metavar="FILE", help="write every number")
    return flags


def parser(task: Task, description: str) -> argparse.ArgumentParser:
    """The flags of a comparison."""
    unit = UNITS[task]
    flags = common_parser(description, rounds=5)
    add = flags.add_argument
    add(f"--{unit}-per-step", dest="per_step", type=int, help=f"{unit} of an optimizer step")
    add("--steps", type=int, help="optimizer steps of a turn")
    add("--peer-batch", type=int, default=8, help="most examples of a peer's micro-batch")
    if task == "lm":
        add("--tokens", type=int, default=256, help="tokens of a row")
    add("--parity-steps", type=int, default=20, help="steps by which parity is judged")
    add("--perturb", metavar="ARM", help="disturb one arm's adapter, to see parity refuse")
    return flags


def read(task: Task, values: argparse.Namespace) -> Options:
    """Check a comparison's flags and fill in what was left out.

    Raises:
        AlignkitError: A number out of range, a device that is not there, or a bad output file.
    """
    device = resolve_device(values.device)
    defaults = COMMON_DEFAULTS[device] | _DEFAULTS[device]
    defaults |= _LM_DEFAULTS[device] if task == "lm" else {"tokens": 1}
    return Options(**fill_in(values, device, defaults))


def read_alone(values: argparse.Namespace, **own: Mapping[str, Any]) -> dict[str, Any]:
    """Check the flags of a script that measures alignkit alone, and fill in what was left out.

    Args:
        values: The parsed flags.
        **own: The defaults of a flag of the script's own, by device.

    Raises:
        AlignkitError: As `read`.
    """
    device = resolve_device(values.device)
    chosen = {name: defaults[device] for name, defaults in own.items()}
    return fill_in(values, device, {**COMMON_DEFAULTS[device], **chosen})


def fill_in(values: argparse.Namespace, device: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Check flags and take defaults for those that were left out."""
    given = {name: value for name, value in vars(values).items() if value is not None}
    empty = dict.fromkeys(vars(values))
    chosen = {**empty, **defaults, **given, "device": device}
    for name, value in chosen.items():
        if type(value) is int and name != "seed" and value < 1:
            raise AlignkitError(f"--{name.replace('_', '-')}: must be 1 or more, got {value}")
    for name in ("plot", "json"):
        chosen[name] = check_output(chosen[name], f"--{name}")
    return chosen


def resolve_device(name: str) -> str:
    """Turn ``auto`` into what is there.

    Raises:
        AlignkitError: A GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise AlignkitError("--device cuda: torch sees no GPU here; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
