"""Read class, message and frames of an exception, or of the stack trace of another process."""

from __future__ import annotations

import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

_TRACE = "Traceback (most recent call last):"
_FRAME = re.compile(r'^ +File "(?P<file>.+?)", line (?P<line>\d+)', re.MULTILINE)
_LAST = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?\Z", re.MULTILINE | re.DOTALL)
_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))

Frame = tuple[str, int]
"""A file and the line in it."""


@dataclass(frozen=True)
class Failure:
    """Hold what is known of an exception.

    Example:
        >>> failure = Failure.of(ValueError("no such file"))
        >>> failure.name, failure.message
        ('ValueError', 'no such file')

    Attributes:
        kind: Full name of the exception's class.
        message: Its message.
        frames: The frames it passed, the outermost first.
    """

    kind: str
    message: str
    frames: tuple[Frame, ...]

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return an exception's class, message and frames.

        Those of an exception in a worker process are read from the stack trace in its message.
        """
        message = str(error)
        if _TRACE in message:
            return cls._from_text(message)
        module, name = type(error).__module__, type(error).__qualname__
        kind = name if module == "builtins" else f"{module}.{name}"
        return cls(kind, message, _frames(error))

    @classmethod
    def _from_text(cls, text: str) -> Failure:
        last = text[text.rindex(_TRACE) + len(_TRACE) :].rstrip()
        frames = tuple((m["file"], int(m["line"])) for m in _FRAME.finditer(last))
        said = _LAST.search(last)
        if said is None:
            return cls("RuntimeError", last.splitlines()[-1], frames)
        return cls(said["kind"], said["message"] or "", frames)

    @property
    def name(self) -> str:
        """Return the class's name without its module."""
        return self.kind.rpartition(".")[2]

    @property
    def files(self) -> list[str]:
        """Return the files it passed, innermost first, relative to the folder of packages."""
        files = [file for file, _ in self.frames if not file.startswith("<frozen")]
        return [_below_packages(file) for file in reversed(files)]

    @property
    def origin(self) -> tuple[str, int, bool]:
        """Return the innermost file and line outside of libraries, and whether it is alignkit's."""
        for file, line in reversed(self.frames):
            if file.startswith(_PACKAGE):
                return f"alignkit{file.removeprefix(_PACKAGE)}", line, True
            if not file.startswith(("<", *_INSTALLED)):
                return file, line, False
        return next(iter(self.files), "no file"), 0, True


def _frames(error: BaseException) -> tuple[Frame, ...]:
    """Return the frames of an exception and, after them, those of its causes."""
    found: list[Frame] = []
    at: BaseException | None = error
    while at is not None:
        found += [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(at.__traceback__)]
        at = at.__cause__
    return tuple(found)


def _below_packages(file: str) -> str:
    for folder in _INSTALLED:
        if file.startswith(folder):
            inside = file.removeprefix(folder).lstrip("/\\").replace("\\", "/")
            return inside.rpartition("site-packages/")[2]
    return file
