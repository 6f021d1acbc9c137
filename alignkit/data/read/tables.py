"""Read rows of tables: CSV and TSV with a header, Parquet, and Arrow."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from alignkit.data.read.opened import COMPRESSIONS, Place, bare_suffix, damage_told, open_bytes
from alignkit.data.read.rows import MAX_LINE_BYTES, BadRow, Rows
from alignkit.errors import AlignkitError

_BATCH = 1024  # rows held at a time


def csv_rows(path: Path) -> Rows:
    """Yield the rows of a ``.csv`` or ``.tsv`` file, by the line each begins on; values are text.

    Raises:
        AlignkitError: No header, a column without a name or with another's, or an open quote.
    """
    csv.field_size_limit(max(MAX_LINE_BYTES, csv.field_size_limit()))
    place = Place()
    found = False
    with damage_told(path, place), open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        dialect = csv.excel_tab if bare_suffix(path) == ".tsv" else csv.excel
        lines = csv.reader(text, dialect, strict=True)
        header: list[str] | None = None
        try:
            for values in lines:
                line, place.line = place.line, lines.line_num + 1
                if not values:
                    continue
                if header is None:
                    header = _checked(values, path, line)
                    continue
                found = True
                if len(values) == len(header):
                    yield line, dict(zip(header, values, strict=True))
                else:
                    yield line, BadRow(f"{len(values)} values for {len(header)} columns")
        except csv.Error as error:
            raise AlignkitError(f"{path}:{place.line}: not readable as CSV ({error})") from error
    if not found:
        raise AlignkitError(f"{path}: the file holds no rows; give a header and a row a line")


def _checked(header: list[str], path: Path, line: int) -> list[str]:
    names = [name.strip() for name in header]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if "" in names or doubled is not None:
        what = "a column without a name" if "" in names else f"two columns `{doubled}`"
        raise AlignkitError(f"{path}:{line}: the header has {what}; give each column its own")
    return names


def parquet_rows(path: Path) -> Rows:
    """Yield the rows of a Parquet file, by number from 1."""
    from pyarrow.parquet import ParquetFile

    def batches(file: IO[bytes]) -> Iterator[Any]:
        with ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=_BATCH)

    return _columnar_rows(path, "Parquet", batches)


def arrow_rows(path: Path) -> Rows:
    """Yield the rows of an Arrow file, by number from 1; datasets' ``save_to_disk`` writes such."""
    import pyarrow as pa

    def batches(file: IO[bytes]) -> Iterator[Any]:
        whole = file.read(6) == b"ARROW1"  # a file with its index at the end, or a stream
        file.seek(0)
        if whole:
            reader = pa.ipc.open_file(file)
            tables = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            tables = iter(pa.ipc.open_stream(file))
        for table in tables:
            for at in range(0, table.num_rows, _BATCH):
                yield table.slice(at, _BATCH)

    return _columnar_rows(path, "Arrow", batches)


def _columnar_rows(path: Path, kind: str, batches: Callable[[IO[bytes]], Iterator[Any]]) -> Rows:
    """Yield the rows of a columnar file's batches; a compressed file is first unpacked.

    Raises:
        AlignkitError: The file is damaged, or holds no rows.
    """
    import pyarrow as pa

    place = Place()
    with tempfile.TemporaryFile() as unpacked, path.open("rb") as plain:
        file: IO[bytes] = plain
        if path.suffix in COMPRESSIONS:
            with damage_told(path, place), open_bytes(path) as packed:
                shutil.copyfileobj(packed, unpacked)
            unpacked.seek(0)
            file = unpacked
        try:
            for batch in batches(file):
                batch.validate(full=True)  # offsets of a damaged file would be read out of bounds
                for row in batch.to_pylist():
                    yield place.line, row
                    place.line += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise AlignkitError(
                f"{path}:{place.line}: not readable as {kind} ({reason})"
            ) from error
    if place.line == 1:
        raise AlignkitError(f"{path}: the file holds no rows")
