"""Take data sets of the Hub as sources of rows, through the datasets library."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from alignkit.data.read.hashes import digest_of
from alignkit.data.read.rows import Row, Source
from alignkit.data.read.slices import pick_splits
from alignkit.errors import AlignkitError
from alignkit.models.load import hub_reachable
from alignkit.utils.phases import phase

log = logging.getLogger(__name__)


def hub_splits(
    path: str, streaming: bool, asked: Collection[str] | None = None
) -> dict[str, list[Source]]:
    """Return the splits of a set of the Hub.

    Args:
        path: Its id, ``name`` or ``name:configuration``.
        streaming: Read it over the network instead of downloading it.
        asked: Names of the splits to read; default: the standard ones.

    Raises:
        AlignkitError: The Hub does not give it, or it has no such split.
    """
    name, _, configuration = path.partition(":")
    try:
        with phase(f"asking the Hub for {path}"), _offline_if_unreachable():
            loaded = _load_hub(name, configuration, streaming)
    except Exception as error:  # the Hub's client raises whatever its transport raises
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise AlignkitError(
            f"data.path {path}: not a local path, and the Hub did not give it ({reason}); "
            "pass data.path a local directory or file instead"
        ) from error
    names = pick_splits(path, list(loaded), asked)
    others = ", ".join(str(split) for split in loaded if split not in names)
    if others and asked is None:
        log.info("data.path %s: its splits %s are not read; see data.splits", path, others)
    return {split: [_hub_source(path, split, loaded[split])] for split in names}


def _load_hub(name: str, configuration: str, streaming: bool) -> Any:
    import datasets

    if not configuration:
        return datasets.load_dataset(name, streaming=streaming)
    if configuration in datasets.get_dataset_config_names(name):
        return datasets.load_dataset(name, configuration, streaming=streaming)
    return datasets.load_dataset(name, data_dir=configuration, streaming=streaming)


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Restrict the datasets library to earlier downloads where the Hub does not answer.

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
    """Return a digest of a Hub split's content."""
    if fingerprint := getattr(rows, "_fingerprint", None):
        return str(fingerprint)
    # A set read over the network has none, but its files' addresses hold their revision.
    reading = getattr(getattr(rows, "_ex_iterable", None), "kwargs", None) or {}
    files = [str(file) for file in reading.get("base_files", ())]
    return digest_of("\n".join([path, *files]).encode())
