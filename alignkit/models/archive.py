"""Checkpoint archives: sealed when they are written, verified when they are read, never unpickled.

torch writes a zip. Its records carry checksums that torch does not look at, its directory carries
none, and two flipped bytes load without a word. Every archive therefore ends in a seal, a checksum
of all bytes before it. It lies in the zip's own comment: one file, which any other reader of
torch's archives opens as before.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import write_atomically

_MARK = b"alignkit xxh3 "
_DIGEST_BYTES = 32
_BLOCK = 2**20


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values and tensors as torch does, sealed, whole or not at all.

    Raises:
        AlignkitError: The file cannot be written.
    """

    def fill(file: BinaryIO) -> None:
        torch.save(content, file)
        # The zip ends in the length of its comment, two bytes that are zero until now.
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(_MARK) + _DIGEST_BYTES) + _MARK)
        size = file.tell()
        file.seek(0)
        digest = _digest(file, size)
        file.write(digest)

    write_atomically(path, fill)


def read_archive(place: str | Path) -> dict[str, Any]:
    """Verify and read an archive, onto the CPU.

    Args:
        place: A file, or a URL that fsspec reads.

    Raises:
        AlignkitError: It is missing, damaged, or holds more than plain values and tensors.
    """
    with _one_line(place), _open(place) as file:
        _verify(file, place)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise AlignkitError(f"{place}: holds a {type(content).__name__}, not a checkpoint")
    return content


def verify_archive(path: Path) -> None:
    """Read a whole archive and hold it against its seal.

    Raises:
        AlignkitError: It is missing or damaged.
    """
    with _one_line(path), _open(path) as file:
        _verify(file, path)


@contextmanager
def _one_line(place: str | Path) -> Iterator[None]:
    """Turn what reading an archive may raise into one line about it."""
    try:
        yield
    except AlignkitError:
        raise
    except FileNotFoundError:
        raise AlignkitError(f"{place}: no such checkpoint; give a .ckpt file that exists") from None
    except IsADirectoryError:
        raise AlignkitError(
            f"{place}: a folder without checkpoints; give a .ckpt file, or a run's folder"
        ) from None
    except pickle.UnpicklingError:
        raise AlignkitError(
            f"{place}: holds objects beyond tensors and plain values; only checkpoints written by "
            "alignkit are loaded"
        ) from None
    except Exception as error:  # whatever a file that is no archive makes zipfile and torch do
        raise AlignkitError(f"{place}: not a readable checkpoint ({_first_line(error)})") from None


def local_path(place: str | Path) -> Path | None:
    """Return the path on this machine that a path or URL names; ``None`` for what is elsewhere."""
    if "://" not in str(place):
        return Path(place).expanduser()
    try:
        files, path = url_to_fs(str(place))
    except (ImportError, ValueError):  # a protocol that needs a package, or is unknown
        return None
    return Path(path) if isinstance(files, LocalFileSystem) else None


def _open(place: str | Path) -> BinaryIO:
    path = local_path(place)
    if path is not None:
        return path.open("rb")
    files, url = url_to_fs(str(place))
    with files.open(url, "rb") as file:
        return io.BytesIO(file.read())


def _verify(file: BinaryIO, place: str | Path) -> None:
    size = file.seek(0, os.SEEK_END)
    sealed = size - _DIGEST_BYTES
    file.seek(max(sealed - len(_MARK), 0))
    if file.read(len(_MARK)) == _MARK:
        file.seek(0)
        if _digest(file, sealed) != file.read(_DIGEST_BYTES):
            raise AlignkitError(f"{place}: damaged: its content does not match its checksum")
        return
    # Of an earlier alignkit, or of a file system where Lightning writes by itself.
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise AlignkitError(f"{place}: damaged: {damaged} does not match its checksum")


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the XXH3 hash of the next bytes, as hex digits."""
    total = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    while size > 0 and (count := file.readinto(buffer[: min(size, _BLOCK)])):  # type: ignore[attr-defined]
        total.update(buffer[:count])
        size -= count
    return total.hexdigest().encode()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
