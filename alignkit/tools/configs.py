"""Run ``alignkit configs``, which lists and copies the configurations of the package."""

from __future__ import annotations

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

import alignkit
from alignkit.cli.near import did_you_mean
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import output_path, write_atomically


def configs(name: str | None = None, output: str | None = None) -> None:
    """List the configurations that come with alignkit, or copy one to start from.

    Args:
        name: The one to copy, as listed, such as ``sft_hh_pythia`` or ``demo/dpo``.
        output: The file to write, ``<name>.yaml`` in the working folder by default; an existing
            one is never overwritten.

    Raises:
        AlignkitError: There is no configuration of this name, or the file exists.
    """
    known = {
        str(p.relative_to(configs_folder()).with_suffix("")): p
        for p in configs_folder().rglob("*.yaml")
    }
    if name is None:
        table = Table("name", "what it trains", box=None)
        for each, path in sorted(known.items()):
            table.add_row(each, _summary(path))
        Console().print(table)
        print("copy one with: alignkit configs NAME")
        return
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    if wanted not in known:
        near = did_you_mean(wanted, known)
        raise AlignkitError(f"configs {name}: there are {', '.join(sorted(known))}{near}")
    named = f"{Path(wanted).name}.yaml" if output is None else output
    place = output_path(named, "--output")
    if place.exists():
        raise AlignkitError(f"--output {place}: exists; choose another")
    write_atomically(place, known[wanted].read_text(encoding="utf-8"))
    run = f"alignkit fit --config {shlex.quote(str(place))}"
    print(f"wrote {place}; run it with: {run}")


def configs_folder() -> Path:
    """Return the folder of the configurations, in the installed package or in a clone.

    Raises:
        AlignkitError: Neither holds any.
    """
    home = Path(alignkit.__file__).parent
    for place in (home / "configs", home.parent / "configs"):
        if (place / "demo").is_dir():
            return place
    raise AlignkitError("configs: this installation holds none; install alignkit again")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `configs`, whose name is positional."""
    parser.add_argument("name", nargs="?", help="the one to copy, as listed (default: list all)")
    parser.add_argument("--output", "-o", help="the file to write (default: NAME.yaml here)")


def _summary(path: Path) -> str:
    """Return a configuration's first comment, up to its first full stop."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0]
