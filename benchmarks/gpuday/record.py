"""Keeps figures in a file, a line of JSON each, on disk as soon as one is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WHOLE = "whole"
"""Name of the figure that a part ends with: its seconds."""
ERROR = "error"


class Figures:
    """Appends figures, and knows those of earlier runs on the same device, rows and sizes.

    Args:
        path: The file; made where there is none.
        about: What every line says: device, versions with a digest of the lengths, and whether
            sizes are tiny.
        again: Whether to forget what earlier runs found.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], again: bool = False) -> None:
        self.path, self.about = path, dict(about)
        self._known: dict[tuple[str, str], Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not again:
            for line in read(path):
                same = all(line.get(key) == about[key] for key in ("device", "tiny"))
                if same and _rows(line) in (None, _rows(about)):
                    self._known[line["part"], line["name"]] = line["value"]
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._append("\n")  # an earlier run ended within a line

    def add(self, part: str, name: str, value: Any, unit: str, **settings: Any) -> None:
        """Write one figure."""
        line = {"part": part, "name": name, "value": value, "unit": unit, "settings": settings}
        self._append(json.dumps({**line, **self.about, "at": round(time.time(), 1)}) + "\n")
        self._known[part, name] = value

    def value(self, part: str, name: str) -> Any:
        """A figure's value, or ``None`` where it is not known."""
        return self._known.get((part, name))

    def has(self, part: str, name: str) -> bool:
        """Whether a figure is known."""
        return (part, name) in self._known

    def is_whole(self, part: str) -> bool:
        """Whether a part has come to its end."""
        return self.has(part, WHOLE)

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _rows(about: Mapping[str, Any]) -> str | None:
    """Return the digest of the lengths that figures were measured with, if they say it."""
    versions = about.get("versions")
    return versions.get("lengths") if isinstance(versions, Mapping) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a file's figures; a line that an interruption cut is left out."""
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
