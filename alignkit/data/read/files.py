"""Files as sources of rows, by what their names say: one file, or a directory's splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkit.data.read.hashes import digest_of, file_hash
from alignkit.data.read.json_rows import json_rows, line_rows
from alignkit.data.read.opened import bare_suffix
from alignkit.data.read.rows import MAX_LINE_BYTES, BadRow, Row, Rows, Source
from alignkit.data.read.split_names import FORMATS, SUFFIXES, split_files
from alignkit.data.read.tables import csv_rows, parquet_rows
from alignkit.errors import AlignkitError

DOCUMENTS = (".txt", ".md")
"""Files each of which is one document."""

_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": line_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}


def file_source(path: Path, hashes: Callable[[Path], str] = file_hash) -> Source:
    """The rows of one file.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.
        hashes: Gives the hash of its content.

    Raises:
        AlignkitError: No such file, an unknown suffix, or an empty file. Reading it raises the
            same, with ``file:line``, where it is damaged (a truncated gzip stream, say).
    """
    if not path.is_file():
        raise AlignkitError(f"{path}: no such file; give a file, a directory or a Hub id")
    if not path.name.endswith(SUFFIXES):
        raise AlignkitError(
            f"{path}: unknown format; give one of {', '.join(FORMATS)}, as it is or as .gz or .zst"
        )
    if path.stat().st_size == 0:
        raise AlignkitError(f"{path}: the file is empty; give one with a row a line")
    read = _READERS[bare_suffix(path)]
    return Source(str(path), hashes(path), lambda: read(path))


def directory_splits(
    directory: Path, hashes: Callable[[Path], str] = file_hash
) -> dict[str, list[Source]]:
    """The splits of a directory, from its files' names.

    ``train.jsonl``, ``test.jsonl.gz`` and the shards ``train-00000-of-00002.parquet`` name their
    split; ``valid``, ``val`` and ``dev`` mean ``validation``. Other files are left alone. Where
    all files are `DOCUMENTS`, each is a row of ``train``.

    Raises:
        AlignkitError: No file names a split, several claim one, or shards are missing.
    """
    splits, unread = _files_of(directory)
    if not splits:
        if documents := _documents(directory):
            return {"train": [_document_source(directory, documents, hashes)]}
        others = f"; {', '.join(unread)}: not read" if unread else ""
        raise AlignkitError(
            f"{directory}: no train.*, validation.* or test.* file ({', '.join(FORMATS)}, or "
            f"shards such as train-00000-of-00004.parquet){others}; name one of its files instead"
        )
    return {
        split: [file_source(directory / name, hashes) for name in names]
        for split, names in splits.items()
    }


def files_not_read(directory: Path) -> list[str]:
    """The names of a directory's files that begin like a split and are left alone."""
    return _files_of(directory)[1]


def _files_of(directory: Path) -> tuple[dict[str, list[str]], list[str]]:
    try:
        return split_files(path.name for path in directory.iterdir() if path.is_file())
    except AlignkitError as error:
        raise AlignkitError(f"{directory}: {error}") from error


def _documents(directory: Path) -> list[Path]:
    """A directory's files where each one is a document, by name; none where any is not."""
    shown = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    return shown if all(path.suffix in DOCUMENTS and path.is_file() for path in shown) else []


def _document_source(directory: Path, paths: list[Path], hashes: Callable[[Path], str]) -> Source:
    """The documents of a directory, numbered by their files' names."""

    def read() -> Rows:
        yield from enumerate(map(_document, paths), start=1)

    content = "".join(f"{path.name}\n{hashes(path)}\n" for path in paths)
    return Source(str(directory), digest_of(content.encode("utf-8", "surrogateescape")), read)


def _document(path: Path) -> Row:
    if path.stat().st_size > MAX_LINE_BYTES:
        return BadRow(f"{path.name} is longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        return {"text": path.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        return BadRow(f"{path.name} is not UTF-8 (byte {error.start + 1})")
