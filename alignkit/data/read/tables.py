"""Rows of tables: CSV and TSV with a header, and Parquet."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from pathlib import Path

from alignkit.data.read.opened import Place, bare_suffix, damage_told, open_bytes
from alignkit.data.read.rows import MAX_LINE_BYTES, BadRow, Rows
from alignkit.errors import AlignkitError


def csv_rows(path: Path) -> Rows:
    """The rows of a ``.csv`` or ``.tsv`` file, by the line each begins on; values are text.

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
    """The rows of a Parquet file, by number from 1.

    A compressed one is unpacked beside, as Parquet is read from its end.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    place = Place()
    with tempfile.TemporaryFile() as unpacked:
        if path.suffix != ".parquet":
            with damage_told(path, place), open_bytes(path) as file:
                shutil.copyfileobj(file, unpacked)
            unpacked.seek(0)
        try:
            with ParquetFile(path if path.suffix == ".parquet" else unpacked) as table:
                for batch in table.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        yield place.line, row
                        place.line += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise AlignkitError(
                f"{path}:{place.line}: not readable as Parquet ({reason})"
            ) from error
    if place.line == 1:
        raise AlignkitError(f"{path}: the file holds no rows")
