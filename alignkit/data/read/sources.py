"""Find where data comes from: a file, a directory, a Hub dataset, or a mix of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignkit.data.read.files import directory_splits, file_splits, files_not_read
from alignkit.data.read.hashes import file_hash
from alignkit.data.read.hub import hub_splits
from alignkit.data.read.rows import Source
from alignkit.data.read.slices import parse_splits, take
from alignkit.data.read.split_names import SUFFIXES, held_out_name
from alignkit.errors import AlignkitError

DataPath = str | list[str] | dict[str, float]
"""One place, several, or several with the share of examples an epoch draws from each."""

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


def find_splits(
    path: str,
    *,
    splits: Mapping[str, str] | None = None,
    streaming: bool = False,
    hashes: Callable[[Path], str] = file_hash,
) -> dict[str, list[Source]]:
    """Return the splits a path offers, each as one source or more.

    Args:
        path: A local directory (``train.*`` and ``test.*`` or ``validation.*`` files, or whole
            sets of shards, ``train-00000-of-00004.parquet``; what ``save_to_disk`` of the datasets
            library wrote; or documents alone), one file (its rows are all in ``train``), or a Hub
            id, ``name`` or ``name:configuration`` (for HH-RLHF, whose configurations are folders,
            ``Anthropic/hh-rlhf:helpful-base``).
        splits: What makes up each split, as ``{"train": "train_prefs[:5%]"}``; default: the
            standard names. See `alignkit.data.read.slices`.
        streaming: Read a Hub dataset over the network instead of downloading it.
        hashes: Gives the hash of a file's content.

    Raises:
        AlignkitError: Nothing is there, or the Hub cannot be reached.
    """
    wanted = parse_splits(splits)
    asked = None
    if wanted is not None:
        asked = list(dict.fromkeys(part.name for parts in wanted.values() for part in parts))
    found = _offered(path, asked, streaming, hashes)
    if wanted is None:
        return found
    return {
        split: [source for part in parts for source in take(found[part.name], part)]
        for split, parts in wanted.items()
    }


def _offered(
    path: str, asked: list[str] | None, streaming: bool, hashes: Callable[[Path], str]
) -> dict[str, list[Source]]:
    local = Path(path).expanduser()
    try:
        if local.is_dir():
            return directory_splits(local, hashes, asked)
        if local.exists() or _looks_local(path):
            return file_splits(local, hashes, asked)
    except OSError as error:
        raise AlignkitError(f"{path}: cannot be read ({error.strerror or error})") from error
    return hub_splits(path, streaming, asked)


def split_sources(
    path: str, split: str | None, splits: Mapping[str, str] | None = None
) -> list[Source]:
    """Return the sources of one split of a path, or of all; a file is also its name's split.

    Args:
        path: As in `find_splits`, as for ``splits``.
        split: The split; ``None`` for all of them.
        splits: What makes up each.

    Raises:
        AlignkitError: As `find_splits`, or there is no such split.
    """
    offered = find_splits(path, splits=splits)
    if splits is None and split and split == _named_by_file(path):
        split = "train"
    if split is not None and split not in offered:
        raise AlignkitError(f"--split {split}: {path} has {', '.join(offered)}")
    return [source for name in offered if split in (None, name) for source in offered[name]]


def not_read(path: str) -> str:
    """Tell what a path holds besides the splits that are read; empty for nothing."""
    local = Path(path).expanduser()
    names = files_not_read(local) if local.is_dir() else []
    if not names:
        return ""
    return f"{path}: {', '.join(names)}: not read; to use one, name it in data.splits"


def trained_on(path: str) -> str:
    """Tell of a file that is train for being given by itself, though its name says another split.

    Empty of anything else.
    """
    name = _named_by_file(path)
    if not name:
        return ""
    asked = json.dumps({"validation": name})
    return (
        f"{path}: one file, so it is train, not {name}; to hold it out, give its directory; to "
        f"measure on all of it, data.splits='{asked}'"
    )


def _named_by_file(path: str) -> str:
    """Return how the name of a file calls a split that is held out; empty of anything else."""
    file = Path(path).expanduser()
    return held_out_name(file.name) if file.is_file() else ""


def weights_of(path: DataPath) -> dict[str, float | None]:
    """Return the places of a data path with their weights, ``None`` where it gives none.

    Raises:
        AlignkitError: No place, or a weight that is not a positive number.
    """
    places: dict[str, float | None]
    if isinstance(path, dict):
        for place, weight in path.items():
            if not weight > 0:
                raise AlignkitError(f"data.path: the weight of {place} is {weight}; give one > 0")
        places = dict(path)
    else:
        listed = path if isinstance(path, list | tuple) else [path]
        places = {os.fspath(place): None for place in listed}
    if not places:
        raise AlignkitError("data.path: it is empty; give a file, a directory or a Hub id")
    return places


def quotas(sizes: Sequence[int], weights: Sequence[float | None]) -> list[tuple[int, int]]:
    """Return how many of each source's examples an epoch draws: ``(size, drawn)``.

    The mix is as large as it can be without repeating an example: with sizes nᵢ and shares
    pᵢ = wᵢ / Σw it has n = min nᵢ / pᵢ examples. Each epoch draws anew, so over the epochs all
    of a large source is seen.
    """
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(weights):
        return [(size, size) for size in sizes]
    shares = [weight / sum(given) for weight in given]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [
        (size, min(size, max(1, round(total * share))))
        for size, share in zip(sizes, shares, strict=True)
    ]


def _looks_local(path: str) -> bool:
    return path.endswith(SUFFIXES) or not _HUB_ID.match(path) or path.startswith(".")
