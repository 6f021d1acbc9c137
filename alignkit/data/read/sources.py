"""Where data comes from: a file, a directory, a Hub dataset, or a mix of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkit.data.read.files import directory_splits, file_source, files_not_read
from alignkit.data.read.hashes import digest_of, file_hash
from alignkit.data.read.rows import Row, Source
from alignkit.data.read.split_names import SPLITS, SUFFIXES
from alignkit.errors import AlignkitError
from alignkit.models.load import hub_reachable

DataPath = str | list[str] | dict[str, float]
"""One place, several, or several with the share of examples an epoch draws from each."""

log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


def find_splits(
    path: str, *, streaming: bool = False, hashes: Callable[[Path], str] = file_hash
) -> dict[str, list[Source]]:
    """The splits a path offers, each as one source or more.

    Args:
        path: A local directory (``train.*`` and ``test.*`` or ``validation.*`` files, or whole
            sets of shards, ``train-00000-of-00004.parquet``), one file (its rows are all in
            ``train``), or a Hub id, ``name`` or ``name:configuration`` (for HH-RLHF, whose
            configurations are folders, ``Anthropic/hh-rlhf:helpful-base``).
        streaming: Read a Hub dataset over the network instead of downloading it.
        hashes: Gives the hash of a file's content.

    Raises:
        AlignkitError: Nothing is there, or the Hub cannot be reached.
    """
    local = Path(path).expanduser()
    try:
        if local.is_dir():
            return directory_splits(local, hashes)
        if local.exists() or _looks_local(path):
            return {"train": [file_source(local, hashes)]}
    except OSError as error:
        raise AlignkitError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _hub_splits(path, streaming)


def not_read(path: str) -> str:
    """What a path holds besides the splits that are read, in a sentence; empty for nothing."""
    local = Path(path).expanduser()
    names = files_not_read(local) if local.is_dir() else []
    if not names:
        return ""
    return f"{path}: {', '.join(names)}: not read; to use one, name it as data.path"


def weights_of(path: DataPath) -> dict[str, float | None]:
    """The places of a data path with their weights, ``None`` where it gives none.

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
    """How many of each source's examples an epoch draws: ``(size, drawn)``.

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


def _hub_splits(path: str, streaming: bool) -> dict[str, list[Source]]:
    name, _, configuration = path.partition(":")
    try:
        with _offline_if_unreachable():
            loaded = _load_hub(name, configuration, streaming)
    except Exception as error:  # the Hub's client raises whatever its transport raises
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise AlignkitError(
            f"data.path {path}: not a local path, and the Hub did not give it ({reason}); "
            "pass data.path a local directory or file instead"
        ) from error
    splits = {
        split: [_hub_source(path, split, loaded[split])] for split in SPLITS if split in loaded
    }
    others = ", ".join(str(split) for split in loaded if split not in splits)
    if not splits:
        raise AlignkitError(
            f"data.path {path}: it has no split named train, validation or test, only {others}; "
            "save the one to use as a file and give data.path that"
        )
    if others:
        log.info("data.path %s: its splits %s are not read", path, others)
    return splits


def _load_hub(name: str, configuration: str, streaming: bool) -> Any:
    import datasets

    if not configuration:
        return datasets.load_dataset(name, streaming=streaming)
    if configuration in datasets.get_dataset_config_names(name):
        return datasets.load_dataset(name, configuration, streaming=streaming)
    return datasets.load_dataset(name, data_dir=configuration, streaming=streaming)


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Look only at what was downloaded before where the Hub does not answer.

    The Hub's client would otherwise retry for 23 s a file before it looks there.
    """
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    offline = not hub_reachable()
    try:
        for place in places:
            place.HF_HUB_OFFLINE = offline
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _hub_source(path: str, split: str, rows: Any) -> Source:
    def read() -> Iterator[tuple[int, Row]]:
        yield from enumerate(rows, start=1)

    return Source(f"{path}[{split}]", _hub_digest(path, rows), read)


def _hub_digest(path: str, rows: Any) -> str:
    """What a Hub split's content is known by."""
    if fingerprint := getattr(rows, "_fingerprint", None):
        return str(fingerprint)
    # A set read over the network has none, but its files' addresses hold their revision.
    reading = getattr(getattr(rows, "_ex_iterable", None), "kwargs", None) or {}
    files = [str(file) for file in reading.get("base_files", ())]
    return digest_of("\n".join([path, *files]).encode())
