"""Run commands of alignkit as Windows would: without POSIX's modules, signals and open files.

    python as_on_windows.py '[["audit", "train.jsonl"], ["fit", ...]]'

alignkit is imported once before, for the libraries' sake, which know their own systems, and then
anew. It finds no `resource`, no SIGUSR1, no folder that can be opened, no file that can be replaced
or removed while this process holds it open or mapped, and no default encoding for text.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alignkit.cli.command  # noqa: F401

_REAL_OPEN = os.open


def held(path: Path) -> bool:
    """Tell whether this process has a file open or mapped."""
    name = os.path.realpath(path)
    if ".filelock" in name:  # which has code of its own for Windows
        return False
    for handle in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{handle}") == name:
                return True
        except OSError:
            continue
    return name in Path("/proc/self/maps").read_text(encoding="utf-8")


def refuse_held(real: Callable[..., Any], last: bool) -> Callable[..., Any]:
    def guarded(*paths: Any, **options: Any) -> Any:
        for path in paths if last else paths[:1]:
            if isinstance(path, str | Path) and os.path.exists(path) and held(Path(path)):
                raise PermissionError(13, "The process cannot access the file", str(path))
        return real(*paths, **options)

    return guarded


def open_no_folder(path: Any, *rest: Any, **options: Any) -> int:
    if isinstance(path, str | Path) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return _REAL_OPEN(path, *rest, **options)


def no_symlink(*paths: Any, **options: Any) -> None:
    raise OSError(22, "A required privilege is not held by the client")


def main() -> int:
    for name in [name for name in sys.modules if name.partition(".")[0] == "alignkit"]:
        del sys.modules[name]
    for name in ("resource", "fcntl", "pwd", "grp", "termios", "syslog"):
        sys.modules[name] = None  # type: ignore[assignment]
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGQUIT"):
        delattr(signal, name)
    for name in ("fork", "getuid", "geteuid", "killpg", "sched_getaffinity"):
        delattr(os, name)
    for name, last in (("replace", True), ("rename", True), ("unlink", False), ("remove", False)):
        setattr(os, name, refuse_held(getattr(os, name), last))
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    os.open, os.symlink = open_no_folder, no_symlink  # type: ignore[assignment]
    warnings.filterwarnings("error", category=EncodingWarning, module=r"alignkit\.")

    from alignkit.cli import main as alignkit

    for command in json.loads(sys.argv[1]):
        try:
            status = alignkit(command)
        except SystemExit as stop:
            status = int(stop.code or 0)
        if status:
            print(f"{command[0]} ended with {status}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
