"""The splits of a data path as encoded sets: found, encoded or opened, counted, and cut to size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkit.data.cache import cached_store
from alignkit.data.files import Source
from alignkit.data.sources import DataPath, quotas, weights_of
from alignkit.data.store import ExampleSet, Store, StoreWriter
from alignkit.data.text_format import TextFormat
from alignkit.errors import AlignkitError

_log = logging.getLogger("alignkit.data")
_FORMAT_VERSION = 1
_Chosen = tuple[list[Store], list[NDArray[np.int64]]]
"""The stores of a split and, for each, the indices of its examples that are taken."""


class RowEncoder(Protocol):
    """Turns a source's rows into examples."""

    masked: bool

    def text_format(self, systems: Sequence[str], ends: Sequence[int]) -> TextFormat:
        """What generation must know of the examples.

        Args:
            systems: The system messages of the training examples, an empty one for none.
            ends: The ids that end their answers.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """Everything beside the rows that decides the examples, as JSON values."""

    def write(self, source: Source, writer: StoreWriter) -> dict[str, Any]:
        """Encode a source; returns its counts as `Tally.to_dict`, ``systems`` and ``ends``."""


@dataclass(frozen=True)
class Splits:
    """What a data path holds.

    Attributes:
        sets: The examples of ``train``, ``validation`` and ``test``.
        quotas: For each training source, as `alignkit.data.sources.quotas` gives them.
        stats: Numbers about the training split.
        text_format: How its text became tokens.
    """

    sets: dict[str, ExampleSet]
    quotas: list[tuple[int, int]]
    stats: dict[str, float]
    text_format: TextFormat


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

    Raises:
        AlignkitError: The data is missing, empty or bad, or a policy says ``error``.
    """
    parts: dict[str, list[tuple[Store, NDArray[np.int64]]]] = {}
    weights = weights_of(path)
    metas: list[dict[str, Any]] = []
    sizes: list[int] = []
    limits = {"train": max_train_examples}
    for place in weights:
        stores = {
            split: [_encoded(source, encoder, cache, announce) for source in sources]
            for split, sources in find(place).items()
        }
        opened = {
            split: (found, [each[: limits.get(split, max_val_examples)] for each in chosen])
            for split, (found, chosen) in _fill_in(stores, val_fraction, seed).items()
        }
        for split, (found, chosen) in opened.items():
            parts.setdefault(split, []).extend(zip(found, chosen, strict=True))
        found, chosen = opened.get("train", ([], []))
        metas += [store.meta for store in found]
        sizes.append(sum(len(each) for each in chosen))
    sets = {
        split: ExampleSet([store for store, _ in pairs], [chosen for _, chosen in pairs])
        for split, pairs in parts.items()
    }
    for split, examples in sets.items():
        if len(examples) == 0:
            raise AlignkitError(f"data.path {path}: no example is left in {split}")
    stats = _count(metas)
    if "train" in sets:
        stats["train_examples"] = len(sets["train"])
        stats["train_tokens"] = int(sets["train"].lengths.sum())
    systems, ends = ({each for meta in metas for each in meta[key]} for key in ("systems", "ends"))
    text_format = encoder.text_format(sorted(systems), sorted(ends))
    return Splits(sets, quotas(sizes, list(weights.values())), stats, text_format)


def _fill_in(
    found: Mapping[str, list[Store]], val_fraction: float, seed: int
) -> dict[str, _Chosen]:
    """The chosen examples of each split; a validation or test split that is missing is made.

    Without either, a share of the training examples is held out; one of them stands for both.
    """
    splits: dict[str, _Chosen] = {
        split: (stores, [np.arange(len(store), dtype=np.int64) for store in stores])
        for split, stores in found.items()
    }
    if not {"validation", "test"} & set(splits):
        stores = found["train"]
        parts = [_hold_out(len(store), val_fraction, seed) for store in stores]
        splits["train"] = stores, [kept for kept, _ in parts]
        splits["validation"] = stores, [held_out for _, held_out in parts]
    for split, other in (("validation", "test"), ("test", "validation")):
        if split not in splits:
            splits[split] = splits[other]
    return splits


def _hold_out(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of ``count`` examples stay and which are held out, both in order."""
    held_out = np.zeros(count, np.bool_)
    order = np.random.default_rng(seed).permutation(count)
    held_out[order[: max(1, round(share * count))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _encoded(source: Source, encoder: RowEncoder, cache: Path, announce: bool) -> Store:
    identity = {
        "version": _FORMAT_VERSION,
        "kind": type(encoder).__name__,
        "data": source.digest,
        **encoder.identity,
    }

    def build(writer: StoreWriter) -> dict[str, Any]:
        _log.info("encoding %s", source.name)
        return encoder.write(source, writer)

    store = cached_store(cache, identity, build, scored=encoder.masked)
    store.source = source.name
    if announce and _log.isEnabledFor(logging.INFO):
        _log_counts(source.name, store.meta)
    return store


def _count(metas: Sequence[dict[str, Any]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for meta in metas:
        for name, count in meta["counts"].items():
            totals[name] = totals.get(name, 0) + count
    examples = totals.get("examples", 0)
    totals["truncated_frac"] = totals.get("truncated", 0) / examples if examples else 0.0
    return totals


def _log_counts(name: str, meta: dict[str, Any]) -> None:
    counts, lines = dict(meta["counts"]), meta["lines"]
    rows, examples = counts.pop("rows", 0), counts.pop("examples", 0)
    details = "; ".join(
        f"{defect} {count} (line {', '.join(map(str, sorted(lines[defect])))}"
        f"{', …' if count > len(lines[defect]) else ''})"
        for defect, count in sorted(counts.items())
    )
    _log.info("%s: %d rows, %d examples; %s", name, rows, examples, details or "no defects")
