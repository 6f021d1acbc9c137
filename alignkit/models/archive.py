"""Write checkpoint archives with a checksum, and verify it when they are read.

torch writes a zip file. Its records have checksums, which torch does not check, and its directory
has none. torch therefore loads a file with flipped bytes without an error. Every archive of ours
ends in a seal, which is a checksum of all bytes before it. The seal lies in the zip's own comment,
so that any other reader of torch's archives opens the file as before. Nothing is unpickled.
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

_SEAL_MARK = b"alignkit xxh3 "
_DIGEST_BYTES = 32
_BLOCK_BYTES = 2**20


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values and tensors as torch does, sealed, whole or not at all.

    Raises:
        AlignkitError: The file cannot be written.
    """

    def fill(file: BinaryIO) -> None:
        torch.save(content, file)
        # The zip's last two bytes are the length of its comment, which is zero so far.
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(_SEAL_MARK) + _DIGEST_BYTES) + _SEAL_MARK)
        size = file.tell()
        file.seek(0)
        digest = _digest(file, size)
        file.write(digest)

    write_atomically(path, fill)


def read_archive(place: str | Path, *, tensors: bool = True, whole: bool = True) -> dict[str, Any]:
    """Read an archive onto the CPU, once it is verified.

    Args:
        place: A file, or a URL that fsspec reads.
        tensors: Whether to read tensors; else they have a shape and no content.
        whole: Whether to verify the archive, for which all of it is read.

    Raises:
        AlignkitError: It is missing, damaged, or holds more than plain values and tensors.
    """
    with _errors_in_one_line(place), _open(place) as file:
        if whole:
            _verify_seal(file, place)
            file.seek(0)
        content = torch.load(file, map_location="cpu" if tensors else "meta", weights_only=True)
    if not isinstance(content, dict):
        raise AlignkitError(f"{place}: holds a {type(content).__name__}, not a checkpoint")
    return content


def verify_archive(path: Path) -> None:
    """Read a whole archive and compare it with its seal.

    Raises:
        AlignkitError: It is missing or damaged.
    """
    with _errors_in_one_line(path), _open(path) as file:
        _verify_seal(file, path)


@contextmanager
def _errors_in_one_line(place: str | Path) -> Iterator[None]:
    """Turn any error of reading an archive into one line about it."""
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
    except Exception as error:  # zipfile and torch raise many kinds of errors over other files
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


def _verify_seal(file: BinaryIO, place: str | Path) -> None:
    size = file.seek(0, os.SEEK_END)
    sealed = size - _DIGEST_BYTES
    file.seek(max(sealed - len(_SEAL_MARK), 0))
    if file.read(len(_SEAL_MARK)) == _SEAL_MARK:
        file.seek(0)
        if _digest(file, sealed) != file.read(_DIGEST_BYTES):
            raise AlignkitError(f"{place}: damaged: its content does not match its checksum")
        return
    # An earlier alignkit wrote it, or Lightning did, which writes to remote file systems itself.
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise AlignkitError(f"{place}: damaged: {damaged} does not match its checksum")


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the XXH3 hash of the next bytes, as hex digits."""
    total = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    while size > 0 and (count := file.readinto(buffer[: min(size, _BLOCK_BYTES)])):  # type: ignore[attr-defined]
        total.update(buffer[:count])
        size -= count
    return total.hexdigest().encode()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
