"""Rows out of files: ``.jsonl``, ``.jsonl.gz`` and ``.parquet``, with the place of each one.

Reading is lazy and its memory flat: no file is held whole, and no line longer than
`MAX_LINE_BYTES` is either.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.data.read.hashes import file_hash
from alignkit.data.read.split_names import SUFFIXES, split_files
from alignkit.errors import AlignkitError

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is a bad row: no text worth training on in one piece is that long."""


class BadRow(NamedTuple):
    """A row that could not be read, and why, in a few words."""

    reason: str


Row = Mapping[str, Any] | BadRow


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    Attributes:
        name: What a person calls it: the file's path, or ``hub-id[split]``.
        digest: Hash of the content, so that a cache knows when it changed.
        rows: Starts reading; yields ``(line, row)`` with lines counted from 1.
    """

    name: str
    digest: str
    rows: Callable[[], Iterator[tuple[int, Row]]]


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
        raise AlignkitError(f"{path}: unknown format; give one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise AlignkitError(f"{path}: the file is empty; give one with a row a line")
    read = _parquet_rows if path.suffix == ".parquet" else _json_rows
    return Source(str(path), hashes(path), lambda: read(path))


def directory_splits(
    directory: Path, hashes: Callable[[Path], str] = file_hash
) -> dict[str, list[Source]]:
    """The splits of a directory, from its files' names.

    ``train.jsonl``, ``test.jsonl.gz`` and the shards ``train-00000-of-00002.parquet`` name their
    split; ``valid``, ``val`` and ``dev`` mean ``validation``. Other files are left alone.

    Raises:
        AlignkitError: No file names a split, several claim one, or shards are missing.
    """
    splits, unread = _files_of(directory)
    if not splits:
        others = f"; {', '.join(unread)}: not read" if unread else ""
        raise AlignkitError(
            f"{directory}: no train.*, validation.* or test.* file ({', '.join(SUFFIXES)}, or "
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    line = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise AlignkitError(f"{path}:{line + 1}: not readable as Parquet ({reason})") from error
    if line == 0:
        raise AlignkitError(f"{path}: the file holds no rows")


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    line = 0
    found = False
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        while True:
            line += 1
            try:
                raw = _read_line(file)
            except (OSError, EOFError, zlib.error) as error:
                raise AlignkitError(
                    f"{path}:{line}: damaged gzip data ({error}); fetch the file again"
                ) from error
            if raw == b"":
                break
            row = _parse_line(raw, first=line == 1)
            if row is not None:
                found = True
                yield line, row
    if not found:
        raise AlignkitError(f"{path}: the file holds no rows; give one with a row a line")


def _read_line(file: Any) -> bytes | BadRow:
    """The next line, or why it was skipped; never more than `MAX_LINE_BYTES` in memory."""
    raw: bytes = file.readline(MAX_LINE_BYTES + 1)
    if len(raw) <= MAX_LINE_BYTES:
        return raw
    size = len(raw)
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(MAX_LINE_BYTES)
        size += len(raw)
    limit = MAX_LINE_BYTES // 2**20
    return BadRow(f"a line of {size / 2**20:.0f} MiB; the limit is {limit} MiB")


def _parse_line(raw: bytes | BadRow, first: bool) -> Row | None:
    """One line as a row, ``None`` where it is blank."""
    if isinstance(raw, BadRow):
        return raw
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except RecursionError:
        return BadRow("nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON ({error})")
    if not isinstance(row, dict):
        return BadRow(f"a JSON object is needed, not {type(row).__name__}")
    return row
