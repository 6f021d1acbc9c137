"""Open files that may be compressed, and report damage in one with its place."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from alignkit.errors import AlignkitError

COMPRESSIONS = (".gz", ".zst")
_DAMAGE = (OSError, EOFError, zlib.error)


def bare_suffix(path: Path) -> str:
    """Return a file's suffix without that of its compression: ``.csv`` of ``a.csv.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def open_bytes(path: Path) -> IO[bytes]:
    """Open the content of a file, which is decompressed as it is read."""
    stream: Any
    if path.suffix == ".gz":
        stream = gzip.GzipFile(path)
        return cast(IO[bytes], stream)
    if path.suffix == ".zst":
        import pyarrow as pa  # only where it is needed

        stream = pa.input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream)
    return path.open("rb")


class Place:
    """Hold the number of the line or row that is read next, for error messages."""

    def __init__(self) -> None:
        self.line = 1


@contextmanager
def damage_told(path: Path, place: Place) -> Iterator[None]:
    """Turn errors of reading a file into one line with the place.

    Raises:
        AlignkitError: The file cannot be read on: compressed data is damaged, or text is no UTF-8.
    """
    try:
        yield
    except _DAMAGE as error:
        kind = {".gz": "damaged gzip data", ".zst": "damaged zstd data"}.get(path.suffix)
        raise AlignkitError(
            f"{path}:{place.line}: {kind or 'not readable'} ({error}); fetch the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"{path}:{place.line}: not UTF-8 at or after this row; save the file as UTF-8"
        ) from error
