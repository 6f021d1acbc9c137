"""Write files whole or not at all."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of a file that is still being written, or that a killed process left behind."""


def write_atomically(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees either the old content or the whole new one.

    The content is written to a hidden file beside the target, on the same file system, flushed to
    the disk with ``fsync``, and renamed to the target in one step. A process that is killed on the
    way, or a full disk, leaves the old file as it was.

    Args:
        path: The file; its folder is made if needed. A device or a pipe, such as
            ``/dev/stdout``, is written to directly.
        content: Bytes, text (written as UTF-8), or a function that fills an open file, which it
            may also read.

    Raises:
        AlignkitError: It cannot be written; the message says why.
    """
    path = Path(path)
    fill = content if callable(content) else _writer(content)
    special = _is_special(path)
    partial = path if special else path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A plain open gives the file the permissions that the user's umask allows.
        with partial.open("wb" if special else "x+b") as file:
            fill(file)
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:  # after closing it: Windows cannot replace an open file
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


def write_beside(path: Path, content: str) -> None:
    """Write what a command had made when it was stopped, and tell where.

    It becomes the output, unless there is a file already, which may be whole: then it lies beside.

    Args:
        path: The output.
        content: What there is of it.
    """
    place = path.with_name(f"{path.name}{PARTIAL}") if path.is_file() else path
    write_atomically(place, content)
    log.warning("stopped: %s holds what there was", place)


def output_path(path: str, argument: str) -> Path:
    """Return where a user wants something written, with ``~`` expanded.

    Args:
        path: As it was given.
        argument: The argument it came from, for the message.

    Raises:
        AlignkitError: It is empty.
    """
    if not path.strip():
        raise AlignkitError(f"{argument}: is empty; give a path")
    return Path(path).expanduser()


def check_output(path: str | None, argument: str) -> Path | None:
    """Check that ``path`` can be written later, without touching a file that is there.

    Args:
        path: The file a user asked for, or ``None``. Its directory is made when it is written.
        argument: The argument it came from, for the message.

    Returns:
        The path, with ``~`` expanded; ``None`` for ``None``.

    Raises:
        AlignkitError: It is empty or a directory, or its directory cannot be made or written to.
    """
    if path is None:
        return None
    target = output_path(path, argument)
    if target.is_dir():
        raise AlignkitError(f"{argument} '{path}': is a directory; name a file in it")
    # The directory is made when the file is written, so that a command that fails leaves none.
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise AlignkitError(
            f"{argument} '{path}': its directory cannot be made ({above} is a file); name another"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise AlignkitError(
            f"{argument} '{path}': its directory cannot be written to; name another"
        )
    return target


def check_outputs(files: Mapping[str, str | None]) -> list[Path | None]:
    """Check the files that a command is to write, each as `check_output` does.

    Args:
        files: The path a user asked for, or ``None``, by its argument.

    Returns:
        The paths, in order.

    Raises:
        AlignkitError: One cannot be written, or two are the same file.
    """
    asked: dict[Path, str] = {}
    for argument, path in files.items():
        if path is not None:
            place = output_path(path, argument).resolve()
            if place in asked and not _is_special(place):
                raise AlignkitError(f"{argument} '{path}': is that of {asked[place]}, too")
            asked[place] = argument
    return [check_output(path, argument) for argument, path in files.items()]


def refuse_overwriting(outputs: Mapping[str, Path | None], inputs: Iterable[str]) -> None:
    """Refuse an output that is a file which the command reads, also through a link.

    Args:
        outputs: The files that are to be written, by their arguments.
        inputs: The files that are read; what is no file is passed over.

    Raises:
        AlignkitError: One is.
    """
    read = [name for name in inputs if Path(name).is_file()]
    for argument, path in outputs.items():
        if path is not None and path.is_file() and any(path.samefile(name) for name in read):
            raise AlignkitError(f"{argument} {path}: is a file that is read; name another")


def make_writable_folder(folder: Path) -> None:
    """Make a folder and test that files can be written in it.

    Args:
        folder: The folder; it and its parents are made if needed.

    Raises:
        AlignkitError: It cannot be made, is read-only, or its disk is full.
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


def share_files(folder: Path) -> None:
    """Give every file of a folder the permissions that the user's umask allows.

    Libraries write through temporary files, which only their owner may read.
    """
    probe = folder / f".{uuid.uuid4().hex}{PARTIAL}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def _is_special(path: Path) -> bool:
    """Tell whether a path is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _writer(content: bytes | str) -> Callable[[BinaryIO], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write(data)


def _unwritable(path: Path, error: OSError) -> AlignkitError:
    reason = error.strerror or error
    return AlignkitError(f"{path}: cannot be written ({reason}); make room, or write elsewhere")


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the `OSError` that a library's exception was raised from, ``None`` without one.

    torch's writer, for one, reports a full disk as "unexpected pos".
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, on systems where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
