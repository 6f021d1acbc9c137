"""Read a data set once for its audit: defects, rows, examples and lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Literal

from alignkit.data.encode.choose import choose_format
from alignkit.data.encode.chunks import chunks
from alignkit.data.encode.columns import named_row
from alignkit.data.read.rows import BadRow, Rows, Source
from alignkit.data.read.sources import not_read, split_sources
from alignkit.data.text.recognise import (
    check_columns,
    kind_of,
)
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.models.load import load_tokenizer
from alignkit.models.text_format import PromptChoice
from alignkit.tools.audit.findings import Findings
from alignkit.tools.audit.scanners import DialogueScanner, Numbered, TextScanner
from alignkit.utils.progress import counting

Kind = Literal["auto", "preference", "sft", "text"]

_CHUNK = 256


def scan(
    path: str,
    *,
    kind: Kind,
    split: str | None,
    splits: Mapping[str, str] | None,
    columns: Mapping[str, str] | None,
    tokenizer: str | None,
    max_length: int,
    prompt_format: PromptChoice,
    examples: int,
) -> Findings:
    """Read every row of a data set once, and return what was found.

    The arguments are those of `alignkit.tools.audit.command.audit`.

    Raises:
        AlignkitError: Nothing can be read there, or there is no such split.
    """
    names = check_columns(columns)
    sources = [_named(source, names) for source in split_sources(path, split, splits)]
    settled_kind = _detect_kind(sources[0]) if kind == "auto" else kind
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    settled_format: str = prompt_format
    if prompt_format == "auto" and loaded is not None and settled_kind != "text":
        sides = preference_sides if settled_kind == "preference" else sft_sides
        settled_format = choose_format(loaded, sources, sides).prompt_format
    found = Findings(
        {
            "path": path,
            "kind": settled_kind,
            "tokenizer": tokenizer,
            "unit": "tokens" if tokenizer else "estimated tokens",
            "max_length": max_length,
            "prompt_format": settled_format,
        }
    )
    if splits is None and (told := not_read(path)):
        found.files.append(told)
    scanner = (TextScanner if found.settings["kind"] == "text" else DialogueScanner)(
        found, loaded, examples
    )
    first, done = 1, 0
    with counting("row", None) as count:
        for source in sources:
            rows = last = 0
            for chunk in chunks(_number_rows(source, found, first, examples), _CHUNK):
                scanner.take(source, chunk)
                rows, last = rows + len(chunk), chunk[-1][0]
                count.reach(done + rows)
            found.sources.append({"name": source.name, "first_row": first, "rows": rows})
            first, done = max(first, last + 1), done + rows
    return found


def _named(source: Source, columns: Mapping[str, str] | None) -> Source:
    """Return a source whose rows have their columns by the names that are read."""
    if columns is None:
        return source

    def rows() -> Rows:
        return ((line, named_row(row, columns)) for line, row in source.rows())

    return Source(source.name, source.digest, rows)


def _number_rows(source: Source, found: Findings, first: int, limit: int) -> Iterator[Numbered]:
    """Yield the source's rows with their numbers from ``first`` on, and count unreadable ones."""
    for line, row in source.rows():
        number = first + line - 1
        found.tally.add("rows", number)
        if isinstance(row, BadRow):
            found.add("bad_rows", number, row.reason, limit)
        yield number, row


def _detect_kind(source: Source) -> str:
    """Return the kind of a source's rows, decided by the first readable one."""
    readable_rows = (row for _, row in source.rows() if not isinstance(row, BadRow))
    for row in islice(readable_rows, 1):
        return kind_of(row)
    return "sft"
