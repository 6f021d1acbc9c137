"""Find the checkpoint that a path stands for: a file, or the folder of one run or of several.

Every run keeps its files in a folder of its own, such as ``runs/sft/version_3``. ``runs/sft``
stands for the newest run below it, and a run for its last checkpoint. Damaged files are skipped,
and the log names them.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path, read_archive
from alignkit.models.shards import KEY, stored_tensors, verify_checkpoint
from alignkit.utils.ranks import is_first_rank

log = logging.getLogger(__name__)

LAST = "last"
_SUFFIX = ".ckpt"
# Folders where a run's checkpoints may lie below the given one, those of Lightning included.
_CHECKPOINT_FOLDERS = ("*", "*/checkpoints", "version_*/*", "checkpoints/version_*")
# Files that a folder of weights (of PEFT or of transformers) has and the folder of a run has not.
_WEIGHT_FOLDER_FILES = ("adapter_config.json", "config.json")
# Environment variable that tells the launched ranks what the first process found. If they looked
# again, they could find a file that another run has written since.
_FOUND_VARIABLE = "ALIGNKIT_FOUND"


def find_checkpoint(place: str | Path) -> str:
    """Return the file that a path stands for.

    Args:
        place: A checkpoint, or the folder of a run or of several (``runs/sft``), which stands for
            the newest intact last checkpoint there. A file such as ``runs/sft/last.ckpt`` may lie
            in the folder of a run below.

    Returns:
        The file. A URL, an adapter, a model or a missing file is returned as it is.

    Raises:
        AlignkitError: All checkpoints there are damaged.
    """
    path = local_path(place)
    if path is None or path.is_file():
        return str(place)
    if path.is_dir() and not any((path / name).exists() for name in _WEIGHT_FOLDER_FILES):
        candidates = newest_first(path)
    elif path.suffix == _SUFFIX and path.parent.is_dir():
        found = (file for folder in _folders(path.parent) for file in [folder / path.name])
        candidates = iter(sorted(filter(Path.is_file, found), key=time_written, reverse=True))
    else:
        return str(place)
    return first_intact(candidates, place) or str(place)


def load_checkpoint(place: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """Read the checkpoint that a path stands for.

    Args:
        place: As in `find_checkpoint`.
        whole: Whether to read tensors that lie in shards; else they have a shape and no content.

    Raises:
        AlignkitError: It is missing or damaged, or holds more than plain values and tensors. The
            line names an intact one where there is one.
    """
    found = find_checkpoint(place)
    with _name_an_intact_one(found):
        content = read_archive(found)
        stored = stored_tensors(found, content)
        return stored.whole() if whole and stored is not None else content


def verified(place: Any) -> Any:
    """Return the file that a path stands for, once it is verified; an open file as it is.

    A checkpoint with shards comes as an open file that holds it whole.

    Raises:
        AlignkitError: It is missing or damaged.
    """
    if not isinstance(place, str | Path) or local_path(place) is None:
        return place
    found = find_checkpoint(place)
    with _name_an_intact_one(found):
        if KEY not in read_archive(found, tensors=False):
            return found
    whole = io.BytesIO()
    torch.save(load_checkpoint(found), whole)
    whole.seek(0)
    return whole


@contextmanager
def _name_an_intact_one(found: str) -> Iterator[None]:
    """Add to an error the name of an intact checkpoint beside the file."""
    try:
        yield
    except AlignkitError as error:
        path = local_path(found)
        other = newest_intact(path.parent, besides=path) if path is not None else None
        if other is None:
            raise
        raise AlignkitError(f"{error}; {other} is intact") from None


def first_intact(candidates: Iterable[Path], place: str | Path, *, told: bool = True) -> str | None:
    """Return the first candidate that is intact, and log those that were skipped.

    Args:
        candidates: Files in order of preference.
        place: The path that the user gave, for the log and the message.
        told: Whether to log which one was taken.

    Returns:
        The file; ``None`` where there are no candidates.

    Raises:
        AlignkitError: All of them are damaged.
    """
    found = _found_by_launcher(place)
    if found is not None:
        return found
    damaged: list[AlignkitError] = []
    for candidate in candidates:
        damage = _damage(candidate)
        if damage is None:
            _tell_launched_ranks(place, candidate, damaged, told)
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
        verify_checkpoint(candidate)
    except AlignkitError as error:
        return error
    return None


def newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a folder, run by run: a run's last ones, then its others."""
    runs = [files for place in _folders(folder) if (files := _checkpoints(place))]
    for files in sorted(runs, key=lambda files: max(map(time_written, files)), reverse=True):
        lasts = [file for file in files if file.stem == LAST or file.stem.startswith(f"{LAST}-")]
        others = [file for file in files if file not in lasts]
        yield from sorted(lasts, key=time_written, reverse=True)
        yield from sorted(others, key=_training_progress, reverse=True)


def _folders(folder: Path) -> list[Path]:
    """Return a folder and those below it where runs keep checkpoints."""
    below = {
        place for pattern in _CHECKPOINT_FOLDERS for place in folder.glob(pattern) if place.is_dir()
    }
    return [folder, *sorted(below)]


def _checkpoints(folder: Path) -> list[Path]:
    return [file for file in folder.glob(f"[!.]*{_SUFFIX}") if file.is_file()]


def time_written(file: Path) -> int:
    """Return when a file was written, in nanoseconds; 0 where it is gone."""
    try:
        return file.stat().st_mtime_ns
    except OSError:  # another process has removed it meanwhile
        return 0


def _training_progress(file: Path) -> tuple[int, int]:
    """Return a file's training step and time of writing; a file that cannot be read comes last."""
    try:
        return int(read_archive(file).get("global_step", 0)), time_written(file)
    except AlignkitError:
        return -1, time_written(file)


def _found_by_launcher(place: str | Path) -> str | None:
    """Return what the launching process found for a path, and forget it.

    The launching process looks again for every later call, too.
    """
    found: dict[str, str] = json.loads(os.environ.get(_FOUND_VARIABLE, "{}"))
    file = None if is_first_rank() else found.pop(str(Path(place).absolute()), None)
    if file is not None:
        os.environ[_FOUND_VARIABLE] = json.dumps(found)
    return file


def _tell_launched_ranks(
    place: str | Path, file: Path, damaged: list[AlignkitError], told: bool
) -> None:
    if not is_first_rank():
        return
    if damaged:
        log.warning("%s: taking %s, for %s", place, file, "; ".join(map(str, damaged)))
    elif told:
        log.info("%s: taking %s", place, file)
    found = json.loads(os.environ.get(_FOUND_VARIABLE, "{}"))
    os.environ[_FOUND_VARIABLE] = json.dumps({**found, str(Path(place).absolute()): str(file)})
