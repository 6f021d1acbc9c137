"""Output files: refused before the work starts if they cannot be written, replaced in one step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from alignkit.errors import AlignkitError


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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    The temporary file keeps the suffix, which libraries read the format from.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
