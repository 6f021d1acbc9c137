"""Measure a file by its size and checksums, which show whether it was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from alignkit.data.read.hashes import add_file

_BLOCK = 2**16
_CHECKED_WHOLE = 2**31


def measure(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """Compute the size and the checksums of a file.

    A file too large to be read whole at every start is checked by its size and by the checksum
    of sixteen blocks spread over it; ``whole`` reads it all the same. It is read rather than
    mapped: what is mapped counts as the process's memory.
    """
    size = path.stat().st_size
    checks: dict[str, Any] = {"bytes": size}
    if whole or size <= _CHECKED_WHOLE:
        total = xxhash.xxh3_64()
        add_file(total, path)
        checks["xxh3"] = total.hexdigest()
    if size > _CHECKED_WHOLE:
        total = xxhash.xxh3_64()
        with path.open("rb") as file:
            for part in range(16):
                file.seek(part * (size - _BLOCK) // 15)
                total.update(file.read(_BLOCK))
        checks["sampled_xxh3"] = total.hexdigest()
    return checks
