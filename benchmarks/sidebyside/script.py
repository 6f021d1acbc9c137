"""What the scripts do: ``dpo.py``, ``sft.py`` and ``lora.py`` given who is compared."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from alignkit.errors import AlignkitError
from sidebyside import options, output, summary
from sidebyside.experiment import Contest, compare

_Chosen = TypeVar("_Chosen", bound=options.Common)


def measure(
    parse: Callable[[], _Chosen], run: Callable[[_Chosen, Console, Path], dict[str, Any]]
) -> int:
    """Measure alignkit alone: read the command line, run in a scratch folder, write the numbers.

    Returns:
        The exit code: 2 for a user's mistake.
    """
    disable_progress_bar()
    try:
        chosen = parse()
        with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as directory:
            output.write_json(chosen.json, run(chosen, Console(), Path(directory)))
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(
    contest: Contest, wanted: Mapping[str, tuple[str, summary.Ratio]], description: str
) -> int:
    """Read the command line, compare, and write the results down.

    Args:
        contest: Who is compared.
        wanted: The ratios, as `summary.ratios` takes them.
        description: For ``--help``.

    Returns:
        The exit code: 1 where the arms do not compute the same thing, 2 for a user's mistake.
    """
    console = Console()
    disable_progress_bar()
    values = options.parser(contest.task, description).parse_args()
    unit = options.UNITS[contest.task]
    try:
        chosen = options.read(contest.task, values)
        outcome = compare(contest, chosen, console)
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = {
        **outcome.machine,
        "matmul_flops": outcome.ceiling,
        "matmul_dtype": chosen.dtype,
        "model": chosen.model,
        "data": chosen.data or "synthetic",
        "command": output.command(),
    }
    arms = summary.arms(outcome, unit)
    ratios = summary.ratios(outcome, wanted)
    output.print_parity(console, outcome.parity)
    result = {"ratios": ratios, "parity": outcome.parity, "arms": arms, "machine": machine}
    output.write_json(chosen.json, result)
    if not outcome.parity["passed"]:
        return 1
    output.print_arms(console, arms, ratios, unit)
    output.print_machine(console, machine)
    output.draw_arms(chosen.plot, arms, unit)
    return 0
