"""Run ``alignkit plan``, which sizes a fit before its weights are loaded.

A step runs on tensors that have a size and no content, at two numbers of tokens. What lives at its
peak grows in a straight line with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from alignkit.cli.loss import spell_out_losses
from alignkit.cli.optimizer import spell_out_optimizers
from alignkit.cli.settings import check_config_files, check_trainer
from alignkit.cli.training import AlignCLI
from alignkit.errors import AlignkitError
from alignkit.tools.generate.request import as_json
from alignkit.tools.plan.model import simulate_models
from alignkit.tools.plan.result import SLACK, SLACK_RECOMPUTED, Line, Plan, phase_lines
from alignkit.tools.plan.settings import Settings, read_settings
from alignkit.tools.plan.step import measure_steps, row_of
from alignkit.utils.atomic import check_output, write_atomically

_IMPORTED_LATER = 2**25  # what a run imports once it trains, optimizers' and Lightning's own parts
_SCORED = 256  # tokens from which on the head's chunks are full
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_EXAMPLE = """
Size a fit before it runs: parameters, memory, and the tokens_per_batch that a device has room for.
It takes the configurations and options of fit, and reads the model's config alone. Example:
alignkit plan --config configs/dpo_hh_pythia.yaml --model.quantize nf4 --memory 24GiB
"""


class PlanCLI(AlignCLI):
    """Parse the options of ``fit`` and of ``plan``, and make nothing of them."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(
            arguments,
            run=False,
            parser_kwargs={"prog": "alignkit plan", "description": _EXAMPLE},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``plan``'s own options, and those of ``fit`` that a saved configuration has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory",
            type=str | None,
            default=None,
            help="The device's memory, such as 24GiB; by default this machine's, of a GPU if it "
            "has one.",
        )
        parser.add_argument(
            "--json", type=str | None, default=None, help="A file for every number, in bytes."
        )
        parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    def _parse_ckpt_path(self) -> None:
        """Ignore a checkpoint to resume from, which changes no sizes."""

    def _set_seed(self) -> None:
        """Draw nothing."""

    def before_instantiate_classes(self) -> None:
        """Refuse trainer settings that ``fit`` refuses."""
        check_trainer("plan", self.config.trainer)

    def instantiate_classes(self) -> None:
        """Make nothing."""


def parse(arguments: Sequence[str]) -> Any:
    """Parse a command line, and return its configuration.

    Raises:
        AlignkitError: The configuration or an option is wrong.
    """
    check_config_files(arguments)
    return PlanCLI(spell_out_optimizers(spell_out_losses(arguments))).config


def run(arguments: Sequence[str]) -> int:
    """Print the sizes of the fit that a command line describes, and return the exit status.

    Args:
        arguments: What follows ``alignkit plan``.

    Raises:
        AlignkitError: The configuration or an option is wrong, or the model cannot be sized.
    """
    config = parse(arguments)
    memory = None if config.memory is None else parse_memory(config.memory)
    output = check_output(config.json, "--json")
    result = plan(read_settings(config), memory)
    if output is not None:
        write_atomically(output, as_json(result.to_dict()))
    console = Console()
    before, after = result.caption()[:2], result.caption()[2:]
    console.print(*before, result.to_table(), *after, sep="\n", markup=False, soft_wrap=True)
    return 0


def plan(settings: Settings, memory: int | None = None) -> Plan:
    """Compute the sizes of a run.

    Args:
        settings: The run.
        memory: Bytes of the device; ``None`` for this machine's.

    Raises:
        AlignkitError: The model cannot be sized without its weights.
    """
    program = resident_bytes()
    device = torch.device("cuda" if settings.gpus else "cpu")
    models = simulate_models(settings, device)
    base = row_of(settings, 1)
    few = base.num_tokens * max(1, -(-_SCORED // base.num_scored))
    less, more = (measure_steps(settings, models, row_of(settings, n)) for n in (few, 2 * few))
    buckets = models.weights.trained if settings.ranks > 1 else 0
    lines = phase_lines(less, more)
    named, found = _device(settings.gpus, settings.ranks)
    return Plan(
        what=_what(settings),
        parameters=models.parameters,
        device=named if memory is None else "a device",
        memory=found if memory is None else memory,
        program=0 if settings.gpus else program + _IMPORTED_LATER,
        weights=models.weights,
        gradients=less.gradients + buckets,
        states=less.states,
        kept=Line.through(less.tokens, less.kept, more.tokens, more.kept),
        logits=more.logits,
        phases={name: Line(line.fixed + buckets, line.each) for name, line in lines.items()},
        tokens=settings.tokens,
        longest=base.num_tokens,
        slack=(SLACK_RECOMPUTED if settings.checkpointing else SLACK)[device.type],
    )


def parse_memory(text: str) -> int:
    """Return the bytes that a size such as ``24GiB`` or ``80GB`` means.

    Example:
        >>> parse_memory("1.5 GiB"), parse_memory("2GB")
        (1610612736, 2000000000)

    Raises:
        AlignkitError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    number = float(found[1]) if found else 0.0
    if found is None or not number:
        raise AlignkitError(f"memory: {text} is no size; give one such as 24GiB")
    unit = found[2].upper()
    binary = found[3] or not text.strip().upper().endswith("B")
    factor = _UNITS[unit] if binary else 1000 ** list(_UNITS).index(unit)
    return int(number * factor)


def resident_bytes() -> int:
    """Return the memory of this process, which has imported what a fit imports."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    return int(status.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _device(gpus: bool, ranks: int) -> tuple[str, int]:
    """Return the name of the device that one process has, and its memory."""
    if gpus:
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    if not hasattr(os, "sysconf"):
        raise AlignkitError("memory: this system does not tell; give one such as --memory 24GiB")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = [Path(place) for place in _LIMITS if Path(place).exists()]
    limits = [place.read_text(encoding="utf-8").strip() for place in there]
    total = min([total, *(int(limit) for limit in limits if limit.isdigit())])
    return "this machine's memory" if ranks == 1 else "a process's share", total // ranks


def _what(settings: Settings) -> dict[str, Any]:
    return {
        "stage": settings.stage,
        "base": settings.base,
        "dtype": str(settings.half or settings.dtype).removeprefix("torch."),
        "precision": settings.precision,
        "quantize": settings.quantize,
        "checkpointing": "activation checkpointing" if settings.checkpointing else None,
    }
