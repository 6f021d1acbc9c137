"""Run ``alignkit report``, which draws what runs have logged."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from jsonargparse import ArgumentParser

from alignkit.errors import AlignkitError
from alignkit.tools.curves import Scalars, draw_curves, read_scalars
from alignkit.tools.naming import name_models
from alignkit.tools.page import write_page
from alignkit.tools.plots import save
from alignkit.utils.atomic import output_path, write_atomically

_VERSION = re.compile(r"version_\d+")
_FIRST = ("loss", "perplexity", "token_accuracy", "rewards/accuracies", "rewards/margins")


def report(runs: list[str], output: str = "report") -> Path:
    """Draw the losses of runs, and sum up their last values, as PNG and HTML.

    Args:
        runs: NAME=DIR or DIR each: the folder of a run, or one above its versions.
        output: The folder to write: ``losses.png``, and ``index.html``, which needs no other file.

    Returns:
        The folder.

    Raises:
        AlignkitError: A run has no event files, two have one name, or nothing can be written.
    """
    folder = output_path(output, "--output")
    given = name_models(runs, "runs")
    named = {name: path for run in given.items() for name, path in _versions(*run)}
    scalars = {name: read_scalars(path) for name, path in named.items()}
    tags = [
        tag
        for quantity in _FIRST
        for tag in (f"train/{quantity}", f"val/{quantity}")
        if any(tag in found for found in scalars.values())
    ]
    if not tags:
        raise AlignkitError(f"runs {', '.join(named)}: none has logged a loss")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlignkitError(f"--output {output}: {error.strerror}; choose another") from error
    picture = folder / "losses.png"
    figure = draw_curves(scalars, tags)
    save(figure, picture)
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="Losses of the runs" src="data:image/png;base64,{data}">'
    page = write_page("Report of runs", _summary(scalars, tags) + image)
    write_atomically(folder / "index.html", page)
    print(f"wrote {picture} and {folder / 'index.html'}")
    return folder


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `report`, whose runs are positional."""
    parser.add_argument("runs", nargs="+", type=str, metavar="[NAME=]DIR", help="Runs' folders.")
    parser.add_function_arguments(report, skip={"runs"})


def _versions(name: str, path: str) -> list[tuple[str, str]]:
    """Return every version of a run by a name of its own, or the folder itself."""
    found = sorted(
        (
            folder
            for folder in Path(path).glob("version_*")
            if _VERSION.fullmatch(folder.name) and any(folder.glob("events.out.*"))
        ),
        key=lambda folder: int(folder.name.removeprefix("version_")),
    )
    if len(found) < 2:
        return [(name, path)]
    return [(f"{name}/{folder.name}", str(folder)) for folder in found]


def _summary(scalars: Mapping[str, Scalars], tags: list[str]) -> str:
    """Return a table with the last value of each quantity of each run."""
    head = "<th>run</th><th class=n>steps</th>" + "".join(f"<th class=n>{t}</th>" for t in tags)
    rows = ""
    for name, found in scalars.items():
        steps = max((points[-1][0] for points in found.values()), default=0)
        cells = "".join(
            f"<td class=n>{found[tag][-1][1]:.4g}</td>" if tag in found else "<td class=n>–</td>"
            for tag in tags
        )
        rows += f"<tr><td>{escape(name)}</td><td class=n>{steps}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"
