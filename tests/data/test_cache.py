"""The cache: addressed by content, written once, rebuilt when damaged."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignkit.data import HHPreferenceDataModule, HHSFTDataModule, Policies
from alignkit.data.keep.cache import cached_store
from alignkit.data.keep.store import ExampleSet, Store, StoreError, StoreWriter
from alignkit.engine import Example
from alignkit.errors import AlignkitError

EXAMPLES = [
    Example([1, 2], [[3, 4], [5]]),
    Example([], [[6, 7, 8]]),
    Example([9], [[10], [11], [12, 13]]),
]


def build(writer: StoreWriter) -> dict[str, Any]:
    for line, example in enumerate(EXAMPLES, start=1):
        writer.add(example, 10 * line)
    return {"counts": {"rows": 3}, "lines": {}}


def as_lists(example: Example) -> tuple[list[int], list[list[int]]]:
    return list(example.prompt), [list(response) for response in example.responses]


def check(store: Store) -> None:
    assert [as_lists(store[i]) for i in range(len(store))] == [as_lists(e) for e in EXAMPLES]
    assert store.lengths.tolist() == [5, 3, 5]
    assert store.lines.tolist() == [10, 20, 30]
    assert store.meta["counts"] == {"rows": 3}


def test_a_store_gives_back_what_it_took(tmp_path: Path) -> None:
    store = cached_store(tmp_path, {"a": 1}, build)
    check(store)
    check(cached_store(tmp_path, {"a": 1}, lambda _: pytest.fail("it is there already")))
    check(pickle.loads(pickle.dumps(store)))
    chosen = [np.array([2]), np.array([0, 1])]
    both = ExampleSet([store, store], chosen)
    assert [as_lists(both[i]) for i in range(3)] == [as_lists(EXAMPLES[i]) for i in (2, 0, 1)]
    assert both.lengths.tolist() == [5, 5, 3] and both.sizes == [1, 2]


def test_masks_travel(tmp_path: Path) -> None:
    def write(writer: StoreWriter) -> dict[str, Any]:
        writer.add(Example([1], [[2, 3, 4]], [[True, False, True]]), 1)
        return {}

    (mask,) = cached_store(tmp_path, {}, write, scored=True)[0].scored or []
    assert list(mask) == [True, False, True]


def damage_cut(directory: Path) -> None:
    path = directory / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])


def damage_flip(directory: Path) -> None:
    path = directory / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


def damage_offsets(directory: Path) -> None:
    path = directory / "segments.bin"
    path.write_bytes(path.read_bytes()[::-1])


def damage_missing(directory: Path) -> None:
    (directory / "lines.bin").unlink()


def damage_no_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def damage_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('\\"rows\\": 3', '\\"rows\\": 4'))


def damage_manifest_type(directory: Path) -> None:
    (directory / "manifest.json").write_text(json.dumps([1]))


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_flip,
        damage_offsets,
        damage_missing,
        damage_no_manifest,
        damage_manifest,
        damage_manifest_type,
    ],
)
def test_damage_is_found_and_mended(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    directory = cached_store(tmp_path, {}, build).directory
    damage(directory)
    with pytest.raises(StoreError):
        Store(directory)
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        check(cached_store(tmp_path, {}, build))
    assert "is damaged" in caplog.text and "building it anew" in caplog.text
    check(cached_store(tmp_path, {}, lambda _: pytest.fail("it was mended")))


def test_a_reader_keeps_what_it_mapped(tmp_path: Path) -> None:
    store = cached_store(tmp_path, {}, build)
    check(store)
    damage_no_manifest(store.directory)
    cached_store(tmp_path, {}, build)
    check(store)


def _build_slowly(root: Path, log: Path) -> None:
    def slow(writer: StoreWriter) -> dict[str, Any]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return build(writer)

    check(cached_store(root, {}, slow))


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    ranks = [context.Process(target=_build_slowly, args=(tmp_path, log)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert log.read_text() == "built\n"


def _hang(root: Path) -> None:
    def hang(writer: StoreWriter) -> dict[str, Any]:
        writer.add(EXAMPLES[0], 1)
        (root / "started").touch()
        time.sleep(60)
        return {}

    cached_store(root, {}, hang)


def test_a_killed_build_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hang, args=(tmp_path,))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    check(cached_store(tmp_path, {}, build))
    assert not list((tmp_path / "encoded").glob("*.partial"))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: StoreWriter) -> dict[str, Any]:
        writer.add(EXAMPLES[0], 1)
        raise AlignkitError("a.jsonl:1: bad")

    with pytest.raises(AlignkitError, match="bad"):
        cached_store(tmp_path, {}, fail)
    check(cached_store(tmp_path, {}, build))


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AlignkitError, match="cannot be written"):
        cached_store(tmp_path / "file", {}, build)


def test_the_address_follows_everything_that_matters(
    hh_dir: Path, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Each change encodes anew; what does not matter finds the set."""
    encoded = tmp_path / "cache" / "encoded"

    def sets() -> int:
        return sum(path.is_dir() for path in encoded.iterdir())

    def open_it(cls: Any = HHPreferenceDataModule, **options: Any) -> None:
        make(cls, hh_dir, **options).setup()

    open_it()
    assert sets() == 2  # train and test
    open_it(seed=5, tokens_per_batch=99, num_workers=2, max_train_examples=3)
    assert sets() == 2
    for count, options in enumerate(
        [
            {"max_length": 100},
            {"prompt_format": "stripped"},
            {"policies": Policies(empty_answers="keep")},
            {"cls": HHSFTDataModule},
            {"cls": HHSFTDataModule, "turns": "all"},
        ],
        start=2,
    ):
        open_it(**options)
        assert sets() == 2 * count, options
    train = hh_dir / "train.jsonl"
    train.write_text(train.read_text().replace("bread", "cakes"))
    open_it()
    assert sets() == 13
