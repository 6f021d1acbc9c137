"""The one way in which files are written: whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from alignkit.errors import AlignkitError

PARTIAL = ".partial"
"""Ends the name of a file that is still being written, or that a killed process left behind."""


def write_atomically(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that whoever opens it sees the old one or the whole new one.

    The content goes to a hidden file beside the target, on the same file system, is forced to the
    disk, and takes the target's name in one step. A process killed on the way, or a disk that is
    full, leaves the old file as it was.

    Args:
        path: What to write; its folder is made if needed. A device or a pipe, such as
            ``/dev/stdout``, is written to directly.
        content: Bytes, text (written as UTF-8), or a function that fills an open file, which it
            may also read.

    Raises:
        AlignkitError: It cannot be written; the line says why.
    """
    path = Path(path)
    fill = content if callable(content) else _writer(content)
    special = path.exists() and not path.is_file() and not path.is_dir()
    partial = path if special else path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made with the permissions that the user's umask leaves to any new file.
        with partial.open("wb" if special else "x+b") as file:
            fill(file)
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:  # closed: Windows replaces no open file
            os.replace(partial, path)
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise _unwritable(path, cause) from error
    finally:
        if not special:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def check_output(path: str | None, argument: str) -> Path | None:
    """Make sure that ``path`` can be written later, without touching a file that is there.

    Args:
        path: The file a user asked for; ``None`` asks for none. Its directory is made if needed.
        argument: The argument it came from, for the message.

    Raises:
        AlignkitError: It is a directory, or its directory cannot be made or written to.
    """
    if path is None:
        return None
    target = Path(path).expanduser()
    if target.is_dir():
        raise AlignkitError(f"{argument} '{path}': is a directory; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlignkitError(
            f"{argument} '{path}': its directory cannot be made ({error.strerror}); name another"
        ) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise AlignkitError(
            f"{argument} '{path}': its directory cannot be written to; name another"
        )
    return target


def make_writable_folder(folder: Path) -> None:
    """Make a folder, and find out now whether files can be written in it.

    Args:
        folder: Made with its parents where it is missing.

    Raises:
        AlignkitError: It cannot be made, or is read-only or full.
    """
    probe = folder / f".{uuid.uuid4().hex}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _writer(content: bytes | str) -> Callable[[BinaryIO], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write(data)


def _unwritable(path: Path, error: OSError) -> AlignkitError:
    reason = error.strerror or error
    return AlignkitError(f"{path}: cannot be written ({reason}); make room, or write elsewhere")


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the system's error behind a library's: torch's writer says "unexpected pos"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Force a renamed file's new name to the disk, where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
