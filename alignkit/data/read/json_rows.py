"""Read rows of JSON, an object a line or one array, without holding the whole file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from alignkit.data.read.opened import Place, damage_told, open_bytes
from alignkit.data.read.rows import MAX_LINE_BYTES, BadRow, Row, Rows
from alignkit.errors import AlignkitError

_CHUNK = 2**16
_SPACE = " \t\r\n"
_NEAR_THE_END = 16  # an error this close to what is read so far may be of what is not read yet


def json_rows(path: Path) -> Rows:
    """Yield the rows of a ``.json`` file, from an array or from an object a line."""
    with damage_told(path, Place()), open_bytes(path) as file:
        start = file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    return array_rows(path) if start.startswith(b"[") else line_rows(path)


def line_rows(path: Path) -> Rows:
    """Yield the rows of a file with a JSON object a line, by line."""
    place = Place()
    found = False
    with damage_told(path, place), open_bytes(path) as file:
        while (raw := _read_line(file)) != b"":
            row = _parse_line(raw, first=place.line == 1)
            if row is not None:
                found = True
                yield place.line, row
            place.line += 1
    if not found:
        raise AlignkitError(f"{path}: the file holds no rows; give one with a row a line")


def array_rows(path: Path) -> Rows:
    """Yield the rows of a JSON array, by number from 1.

    Raises:
        AlignkitError: It is damaged: what follows cannot be told apart from the row it is in.
    """
    place = Place()
    with damage_told(path, place), open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        for value in _Array(text, path, place).values():
            yield place.line, _as_row(value)
            place.line += 1
    if place.line == 1:
        raise AlignkitError(f"{path}: the file holds no rows; its array is empty")


class _Array:
    """Parse an array value by value, and read on as the values need it.

    Args:
        file: What is read.
        path: For errors.
        place: The number of the row that is read.
    """

    def __init__(self, file: IO[str], path: Path, place: Place) -> None:
        self._file = file
        self._path = path
        self._place = place
        self._text = ""
        self._at = 0
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode

    def values(self) -> Iterator[Any]:
        """Yield each value of the array."""
        self._next()
        self._at += 1  # the bracket that made this an array
        if self._next() != "]":
            while True:
                self._next()
                yield self._value()
                mark = self._next()
                self._at += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise self._broken("a comma or the closing bracket is missing before it")
        else:
            self._at += 1
        if self._next():
            raise self._broken("something follows the array")

    def _next(self) -> str:
        """Move to the next character that is no space, and return it; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more(_CHUNK):
                return ""

    def _more(self, size: int) -> bool:
        self._text, self._at = self._text[self._at :], 0
        read = self._file.read(size)
        self._ended = not read
        self._text += read
        return bool(read)

    def _value(self) -> Any:
        """Parse the value at which reading stands.

        A value that is not whole yet is tried again on twice the text, so that a long one costs
        a small multiple of its length.
        """
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError as error:
                raise self._broken("nested too deeply") from error
            except json.JSONDecodeError as error:
                size = len(self._text) - self._at
                whole = error.pos < len(self._text) - _NEAR_THE_END
                if (whole and not error.msg.startswith("Unterminated")) or self._ended:
                    raise self._broken(f"not JSON ({error.msg})") from error
                if size > MAX_LINE_BYTES:
                    limit = MAX_LINE_BYTES // 2**20
                    raise self._broken(f"not JSON, or longer than {limit} MiB") from error
                self._more(max(_CHUNK, size))
            except ValueError as error:  # a number with thousands of digits
                raise self._broken(f"not JSON ({error})") from error
            else:
                if end == len(self._text) and not self._ended:  # a number may go on
                    self._more(_CHUNK)
                    continue
                self._at = end
                return value

    def _broken(self, reason: str) -> AlignkitError:
        where = f"{self._path}:{self._place.line}"
        return AlignkitError(f"{where}: row {self._place.line} of the array: {reason}")


def _read_line(file: IO[bytes]) -> bytes | BadRow:
    """Read the next line, at most `MAX_LINE_BYTES` of it, or return why it was skipped."""
    raw = file.readline(MAX_LINE_BYTES + 1)
    if len(raw) <= MAX_LINE_BYTES:
        return raw
    size = len(raw)
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(MAX_LINE_BYTES)
        size += len(raw)
    limit = MAX_LINE_BYTES // 2**20
    return BadRow(f"a line of {size / 2**20:.0f} MiB; the limit is {limit} MiB")


def _parse_line(raw: bytes | BadRow, first: bool) -> Row | None:
    """Parse one line as a row, ``None`` where it is blank."""
    if isinstance(raw, BadRow):
        return raw
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    if not text.strip():
        return None
    try:
        return _as_row(json.loads(text))
    except RecursionError:
        return BadRow("nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON ({error})")


def _as_row(value: Any) -> Row:
    if not isinstance(value, dict):
        return BadRow(f"a JSON object is needed, not {type(value).__name__}")
    return value
