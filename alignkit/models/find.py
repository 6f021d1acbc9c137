"""Find the checkpoint that a path stands for: a file, or the folder of one run or of several.

Every run keeps its files in a folder of its own, ``runs/sft/version_3``. ``runs/sft`` stands for
the newest of them, and in each for its last checkpoint; what is damaged is passed over, and said.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path, read_archive, verify_archive
from alignkit.utils.ranks import is_first_rank

log = logging.getLogger(__name__)

LAST = "last"
_SUFFIX = ".ckpt"
# Where a run's checkpoints may lie below the folder that is given, Lightning's places included.
_PLACES = ("*", "*/checkpoints", "version_*/*", "checkpoints/version_*")
# What tells a folder of weights, of PEFT or of transformers, from the folder of a run.
_WEIGHTS = ("adapter_config.json", "config.json")
# Hands what the first process found on to the ranks it launches: they must not look again, and
# find what another run has written since.
_HANDED_ON = "ALIGNKIT_FOUND"


def find_checkpoint(place: str | Path) -> str:
    """Return the file that a path stands for.

    Args:
        place: A checkpoint; the folder of a run, or of several (``runs/sft``), for the newest
            intact last checkpoint there; or a file such as ``runs/sft/last.ckpt`` that lies in the
            folder of a run below.

    Returns:
        The file, or ``place`` as it is where it stands for nothing else: a URL, an adapter, a
        model, a file that is missing.

    Raises:
        AlignkitError: All that is there is damaged.
    """
    path = local_path(place)
    if path is None or path.is_file():
        return str(place)
    if path.is_dir() and not any((path / name).exists() for name in _WEIGHTS):
        candidates = newest_first(path)
    elif path.suffix == _SUFFIX and path.parent.is_dir():
        found = (file for folder in _folders(path.parent) for file in [folder / path.name])
        candidates = iter(sorted(filter(Path.is_file, found), key=_written, reverse=True))
    else:
        return str(place)
    return first_intact(candidates, place) or str(place)


def load_checkpoint(place: str | Path) -> dict[str, Any]:
    """Read the checkpoint that a path stands for.

    Raises:
        AlignkitError: It is missing, damaged (the line then names one that is not), or holds more
            than plain values and tensors.
    """
    found = find_checkpoint(place)
    with _naming_another(found):
        return read_archive(found)


def verified(place: Any) -> Any:
    """Return the file that a path stands for once it has been verified; an open file as it is.

    Raises:
        AlignkitError: It is missing or damaged.
    """
    if not isinstance(place, str | Path) or local_path(place) is None:
        return place
    found = find_checkpoint(place)
    with _naming_another(found):
        verify_archive(Path(found))
    return found


@contextmanager
def _naming_another(found: str) -> Iterator[None]:
    """Add to a refusal which checkpoint beside the file is intact."""
    try:
        yield
    except AlignkitError as error:
        path = local_path(found)
        other = newest_intact(path.parent, besides=path) if path is not None else None
        if other is None:
            raise
        raise AlignkitError(f"{error}; {other} is intact") from None


def first_intact(candidates: Iterable[Path], place: str | Path) -> str | None:
    """Return the first candidate that is intact, and say what was passed over.

    Args:
        candidates: Files in order of preference.
        place: What the user gave, for the log and the message.

    Returns:
        The file; ``None`` where there are no candidates.

    Raises:
        AlignkitError: All of them are damaged.
    """
    found = _handed_on(place)
    if found is not None:
        return found
    damaged: list[AlignkitError] = []
    for candidate in candidates:
        damage = _damage(candidate)
        if damage is None:
            _hand_on(place, candidate, damaged)
            return str(candidate)
        damaged.append(damage)
    if damaged:
        raise AlignkitError(f"{place}: holds no intact checkpoint: {damaged[0]}")
    return None


def newest_intact(folder: Path, besides: Path | None = None) -> Path | None:
    """Return the newest intact checkpoint of a run, and of its neighbours where it has none."""
    folders = [folder, *([folder.parent] if folder.name.startswith("version_") else [])]
    for each in folders:
        for candidate in newest_first(each):
            if candidate != besides and _damage(candidate) is None:
                return candidate
    return None


def _damage(candidate: Path) -> AlignkitError | None:
    try:
        verify_archive(candidate)
    except AlignkitError as error:
        return error
    return None


def newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a folder, run by run: a run's last one, then what else it has."""
    runs = [files for place in _folders(folder) if (files := _checkpoints(place))]
    for files in sorted(runs, key=lambda files: max(map(_written, files)), reverse=True):
        lasts = [file for file in files if file.stem == LAST or file.stem.startswith(f"{LAST}-")]
        others = [file for file in files if file not in lasts]
        yield from sorted(lasts, key=_written, reverse=True)
        yield from sorted(others, key=_progress, reverse=True)


def _folders(folder: Path) -> list[Path]:
    """Return a folder and those below it where runs keep checkpoints."""
    below = {place for pattern in _PLACES for place in folder.glob(pattern) if place.is_dir()}
    return [folder, *sorted(below)]


def _checkpoints(folder: Path) -> list[Path]:
    return [file for file in folder.glob(f"[!.]*{_SUFFIX}") if file.is_file()]


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # another process has removed it since
        return 0


def _progress(file: Path) -> tuple[int, int]:
    """How far training had come, and when; a file that cannot be read comes last."""
    try:
        return int(read_archive(file).get("global_step", 0)), _written(file)
    except AlignkitError:
        return -1, _written(file)


def _handed_on(place: str | Path) -> str | None:
    """Return what the launching process found, once: later it has looked again, too."""
    found: dict[str, str] = json.loads(os.environ.get(_HANDED_ON, "{}"))
    file = None if is_first_rank() else found.pop(str(Path(place).absolute()), None)
    if file is not None:
        os.environ[_HANDED_ON] = json.dumps(found)
    return file


def _hand_on(place: str | Path, file: Path, damaged: list[AlignkitError]) -> None:
    if not is_first_rank():
        return
    if damaged:
        log.warning("%s: taking %s, for %s", place, file, "; ".join(map(str, damaged)))
    else:
        log.info("%s: taking %s", place, file)
    found = json.loads(os.environ.get(_HANDED_ON, "{}"))
    os.environ[_HANDED_ON] = json.dumps({**found, str(Path(place).absolute()): str(file)})
