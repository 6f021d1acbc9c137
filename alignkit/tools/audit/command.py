"""Run ``alignkit audit``, which counts, locates and shows every defect of a data set."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from alignkit.data.text.policies import MEANING
from alignkit.models.text_format import PromptChoice
from alignkit.tools.audit.page import page, sentences
from alignkit.tools.audit.scan import Kind, scan
from alignkit.tools.generate.request import printable
from alignkit.utils.atomic import check_outputs, write_atomically

_ROWS_SHOWN = 8
_WIDE = 120


def audit(
    path: str,
    *,
    kind: Kind = "auto",
    split: str | None = None,
    splits: dict[str, str] | None = None,
    columns: dict[str, str] | None = None,
    tokenizer: str | None = None,
    max_length: int = 512,
    prompt_format: PromptChoice = "auto",
    examples: int = 3,
    json: str | None = None,
    html: str | None = None,
) -> dict[str, Any]:
    """Report every defect of a data set.

    Args:
        path: A file, a directory or a Hub id, as the data modules take it.
        kind: What the rows are; ``auto`` decides by the first one.
        split: Audit this split alone (``train``, ``validation`` or ``test``); default: all.
        splits: What makes up each split, as ``data.splits`` has it.
        columns: The rows' columns by the names that are read, as ``data.columns`` has them.
        tokenizer: A Hub id or a local directory. Without one, lengths are estimated as a token
            for every four bytes, and the boundary defects are not counted.
        max_length: Most tokens of a prompt with one answer, EOS included; of a document, for text.
        prompt_format: How dialogues become text: ``boundary``, ``stripped``, ``chat`` or ``raw``,
            which docs/data.md shows. ``auto`` chooses as the data modules do, by the rows and the
            tokenizer's chat template.
        examples: How many examples of each defect to show.
        json: Write the report to this file: counts as numbers under ``rows`` and each defect's
            name, and the rows, by line number from 1, under ``row_numbers`` by the same names.
            Rows of a second file are numbered on from the first one's last.
        html: Write an HTML page with plots to this file.

    Returns:
        The report, as in the JSON file.

    Raises:
        AlignkitError: Nothing can be read there, or an output cannot be written.
    """
    json_file, html_file = check_outputs({"--json": json, "--html": html})
    found = scan(
        path,
        kind=kind,
        split=split,
        splits=splits,
        columns=columns,
        tokenizer=tokenizer,
        max_length=max_length,
        prompt_format=prompt_format,
        examples=examples,
    )
    report = found.to_dict()
    if json_file is not None:
        write_atomically(json_file, jsonlib.dumps(report, indent=1) + "\n")
    if html_file is not None:
        write_atomically(html_file, page(report, found))
    _print(report)
    return report


def status(report: dict[str, Any]) -> int:
    """Return the exit status: 1, after a line that says so, if training could use no row."""
    if report["usable"]:
        return 0
    print(f"alignkit: error: {report['path']}: no row is usable, see above", file=sys.stderr)
    return 1


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `audit`, whose path is positional."""
    parser.add_argument("path", type=str, help="A file, a directory or a Hub id.")
    parser.add_function_arguments(audit, skip={"path"})


def _print(report: dict[str, Any]) -> None:
    console = Console()
    rows = report["rows"]
    table = Table(title=printable(f"{report['path']}: {rows:,} rows ({report['kind']})"))
    table.add_column("defect", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("which")
    wide = console.width >= _WIDE
    if wide:
        table.add_column("meaning")
    for name in MEANING:
        if name in report:
            places = report["row_numbers"][name]
            listed = ", ".join(map(str, places[:_ROWS_SHOWN]))
            more = ", …" if len(places) > _ROWS_SHOWN else ""
            share = f"{report[name] / rows:.1%}" if rows else ""
            meaning = [MEANING[name]] if wide else []
            table.add_row(name, f"{report[name]:,}", share, listed + more, *meaning)
    console.print(table)
    for name in ("bad_rows", "unread_fields"):
        for example in report["examples"].get(name, ()):
            line = f"{name}, row {example['row']}: {example['text']}"
            console.print(printable(line), soft_wrap=True)
    told = ", ".join(f"{count:,} as {shape}" for shape, count in report["read_as"].items())
    if told:
        console.print(printable(f"read: {told}"), soft_wrap=True)
    lengths = Table(title=f"lengths in {report['unit']} (max_length {report['max_length']})")
    lengths.add_column("of")
    for name in next(iter(report["lengths"].values()), {}):
        lengths.add_column(name, justify="right")
    for part, summary in report["lengths"].items():
        lengths.add_row(part, *(f"{value:,.0f}" for value in summary.values()))
    if report["lengths"]:
        console.print(lengths)
    for line in sentences(report):
        console.print(printable(line), soft_wrap=True)
