"""Read text files, each of them one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit.data.read.hashes import digest_of
from alignkit.data.read.opened import Place, damage_told, open_bytes
from alignkit.data.read.rows import MAX_LINE_BYTES, BadRow, Row, Rows, Source


def document_rows(path: Path) -> Rows:
    """Yield the one row of a text file: its document."""
    yield 1, _document(path)


def folder_source(directory: Path, paths: Sequence[Path], hashes: Callable[[Path], str]) -> Source:
    """Return the documents of a directory, numbered in the order of their files' names."""

    def read() -> Rows:
        yield from enumerate(map(_document, paths), start=1)

    content = "".join(f"{path.name}\n{hashes(path)}\n" for path in paths)
    return Source(str(directory), digest_of(content.encode("utf-8", "surrogateescape")), read)


def _document(path: Path) -> Row:
    with damage_told(path, Place()), open_bytes(path) as file:
        content = file.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        return BadRow(f"{path.name} is longer than {MAX_LINE_BYTES // 2**20} MiB; split it")
    try:
        return {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return BadRow(f"{path.name} is not UTF-8 (byte {error.start + 1})")
