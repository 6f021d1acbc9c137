"""Open the splits of a data path as encoded sets, and encode those that are not cached."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkit.data.encode.code import PACKAGE_DIGEST, UnknownContentError, code_identity, is_own
from alignkit.data.encode.workers import Workers
from alignkit.data.keep.cache import cached_store
from alignkit.data.keep.counts import count_defects, log_counts, why_empty
from alignkit.data.keep.position import SETTINGS, SOURCES
from alignkit.data.keep.store import ExampleSet, Store, StoreWriter
from alignkit.data.read.hashes import digest_of
from alignkit.data.read.rows import Source
from alignkit.data.read.sources import DataPath, not_read, quotas, trained_on, weights_of
from alignkit.errors import AlignkitError
from alignkit.models.text_format import TextFormat
from alignkit.utils.phases import phase

log = logging.getLogger(__name__)
# Sets that no later process may take for its own; they go when this process does.
_unshared: list[tempfile.TemporaryDirectory[str]] = []


class _Part(NamedTuple):
    """Hold the examples of one source: their source, their store, and which are taken."""

    source: Source
    store: Store
    chosen: NDArray[np.int64]


class RowEncoder(Protocol):
    """Turn a source's rows into examples."""

    masked: bool

    def text_format(self, systems: Sequence[str], ends: Sequence[int]) -> TextFormat:
        """Return what generation must know of the examples.

        Args:
            systems: The system messages of the training examples, an empty one for none.
            ends: The ids that end their answers.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything beside the rows that decides the examples, as JSON values."""

    def write(self, source: Source, writer: StoreWriter) -> dict[str, Any]:
        """Encode a source; returns its counts as `Tally.to_dict`, ``systems`` and ``ends``.

        One that also takes ``workers`` and is a `ChunkEncoder` may encode in several processes.
        """


@dataclass(frozen=True)
class Splits:
    """Hold the encoded splits of a data path.

    Example:
        >>> opened = Splits({}, [(90, 90)], {"rows": 90.0}, TextFormat("text", 8), {})
        >>> opened.stats
        {'rows': 90.0}

    Attributes:
        sets: The examples of ``train``, ``validation`` and ``test``.
        quotas: For each training source, as `alignkit.data.read.sources.quotas` gives them.
        stats: Numbers about the training split.
        text_format: How its text became tokens.
        content: What the training examples are; see `alignkit.data.keep.position`.
    """

    sets: dict[str, ExampleSet]
    quotas: list[tuple[int, int]]
    stats: dict[str, float]
    text_format: TextFormat
    content: dict[str, Any]


def open_splits(
    path: DataPath,
    find: Callable[[str], Mapping[str, list[Source]]],
    encoder: RowEncoder,
    *,
    cache: Path,
    val_fraction: float,
    seed: int,
    max_train_examples: int | None = None,
    max_val_examples: int | None = None,
    announce: bool = True,
    named: bool = False,
    workers: Workers | None = None,
) -> Splits:
    """Open every split of every place of a path, encoding what is not cached yet.

    Args:
        path: One place, several, or several with weights.
        find: The sources of each split of a place.
        encoder: Turns their rows into examples.
        cache: Where encoded sets are kept.
        val_fraction: Share of the training examples held out where a place has only those.
        seed: Draws that share.
        max_train_examples: Take only the first ones of each training source.
        max_val_examples: Take only the first ones of each other source.
        announce: Log what was found in each source.
        named: Whether someone said which splits are read, so that nobody misses the others.
        workers: Encode what is not cached, if not this process.

    Raises:
        AlignkitError: The data is missing, empty or bad, or a policy says ``error``.
    """
    weights = weights_of(path)
    opener = _Opener(encoder, cache, announce, workers)
    limits = {"train": max_train_examples}
    parts: dict[str, list[_Part]] = {}
    sizes: list[int] = []
    for place in weights:
        found = find(place)
        if announce and not named and (told := not_read(place) or trained_on(place)):
            log.warning("%s", told)
        opened = {
            split: [opener.open(source) for source in sources] for split, sources in found.items()
        }
        splits = _fill_in(opened, val_fraction, seed)
        for split, whole in splits.items():
            limit = limits.get(split, max_val_examples)
            splits[split] = [part._replace(chosen=part.chosen[:limit]) for part in whole]
            parts.setdefault(split, []).extend(splits[split])
        sizes.append(sum(len(part.chosen) for part in splits.get("train", [])))
    sets = {
        split: ExampleSet([part.store for part in taken], [part.chosen for part in taken])
        for split, taken in parts.items()
    }
    for split, examples in sets.items():
        if len(examples) == 0:
            why = why_empty([part.store.meta for part in parts[split]])
            raise AlignkitError(f"data.path {path}: no example is left in {split}: {why}")
    train = parts.get("train", [])
    stats = count_defects([part.store.meta for part in train])
    if "train" in sets:
        stats["train_examples"] = len(sets["train"])
        stats["train_tokens"] = int(sets["train"].lengths.sum())
    metas = [part.store.meta for taken in parts.values() for part in taken]
    systems, ends = ({each for meta in metas for each in meta[key]} for key in ("systems", "ends"))
    text_format = encoder.text_format(sorted(systems), sorted(ends))
    content = {
        SOURCES: [_content(part) for part in train],
        SETTINGS: {
            **opener.settings,
            "val_fraction": val_fraction,
            "max_train_examples": max_train_examples,
        },
    }
    return Splits(sets, quotas(sizes, list(weights.values())), stats, text_format, content)


def _content(part: _Part) -> dict[str, str]:
    return {
        "name": part.source.name,
        "rows": part.source.digest,
        "examples": part.store.digest,
        "chosen": digest_of(part.chosen.tobytes()),
    }


def _fill_in(
    found: Mapping[str, list[_Part]], val_fraction: float, seed: int
) -> dict[str, list[_Part]]:
    """Return the parts of each split, and make a validation or test split that is missing.

    Without either, a share of the training examples is held out; one of them stands for both.
    """
    splits = dict(found)
    if not {"validation", "test"} & set(splits):
        halves = [
            (part, *_hold_out(len(part.store), val_fraction, seed)) for part in splits["train"]
        ]
        splits["train"] = [part._replace(chosen=kept) for part, kept, _ in halves]
        splits["validation"] = [part._replace(chosen=held_out) for part, _, held_out in halves]
    for split, other in (("validation", "test"), ("test", "validation")):
        if split not in splits:
            splits[split] = splits[other]
    return splits


def _hold_out(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw which of ``count`` examples stay and which are held out, both in order."""
    held_out = np.zeros(count, np.bool_)
    order = np.random.default_rng(seed).permutation(count)
    held_out[order[: max(1, round(share * count))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class _Opener:
    """Open sources as encoded sets, from the cache where the code that makes them is known.

    Args:
        encoder: Turns rows into examples.
        cache: Where encoded sets are kept.
        announce: Log what was found in each source.
        workers: Other processes that encode.

    Attributes:
        settings: How the encoder makes examples; empty where that cannot be told.
    """

    def __init__(
        self, encoder: RowEncoder, cache: Path, announce: bool, workers: Workers | None
    ) -> None:
        self._encoder = encoder
        write: Callable[..., dict[str, Any]] = encoder.write
        self._write = partial(write, workers=workers) if workers else write
        self._cache = cache
        self._announce = announce
        self.settings: dict[str, Any] = {}
        self._unknown = ""
        try:
            # Of a user's own encoder its state counts too, as it is before any use.
            self._code = code_identity(type(encoder) if is_own(type(encoder)) else encoder)
            self.settings = encoder.identity
        except UnknownContentError as error:
            self._unknown = str(error)

    def open(self, source: Source) -> _Part:
        """Encode a source, or open the set that an earlier run made of it with the same code."""
        home, identity = self._address(source)

        def build(writer: StoreWriter) -> dict[str, Any]:
            log.info("encoding %s", source.name)
            with phase(f"encoding {source.name}"):
                return self._write(source, writer)

        store = cached_store(home, identity, build, scored=self._encoder.masked)
        store.source = source.name
        if self._announce and log.isEnabledFor(logging.INFO):
            log_counts(source.name, store.meta)
        return _Part(source, store, np.arange(len(store), dtype=np.int64))

    def _address(self, source: Source) -> tuple[Path, dict[str, Any]]:
        """Return the cache folder and the identity of a source's encoded set in it."""
        unknown = self._unknown
        try:
            reader = None if is_own(source.rows) else code_identity(source.rows)
        except UnknownContentError as error:
            unknown = str(error)
        if unknown:
            if self._announce:
                log.warning(
                    "%s: encoded anew in every process, as nobody can tell whether the code that "
                    "reads it is the same (%s)",
                    source.name,
                    unknown,
                )
            _unshared.append(tempfile.TemporaryDirectory(prefix="alignkit-"))
            return Path(_unshared[-1].name), {}
        code = [PACKAGE_DIGEST, self._code, reader]
        return self._cache, {"code": code, "data": source.digest, **self.settings}
