"""Which files make up a split: one file or one whole set of shards; the rest is named."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import HHPreferenceDataModule, PreferenceDataModule
from alignkit.data.read.split_names import split_files
from alignkit.errors import AlignkitError
from alignkit.tools.audit.command import audit
from tests.data.conftest import pair, write_jsonl

GOOD = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
OF_12 = [f"train-{i:05d}-of-00012.parquet" for i in range(12)]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.jsonl", "dev.jsonl.gz"], {"train": 1, "validation": 1}),
        (["test.parquet", "valid.parquet"], {"validation": 1, "test": 1}),
        ([*OF_12, "test-00000-of-00001.parquet"], {"train": 12, "test": 1}),
        (["train-00000-of-00002-0123456789abcdef.parquet",
          "train-00001-of-00002-fedcba9876543210.parquet"], {"train": 2}),
        (["train-1-of-2.jsonl", "train-2-of-2.jsonl"], {"train": 2}),
        ([f"train_{i}.jsonl" for i in range(11)], {"train": 11}),
        (["train.0001.jsonl.gz", "train.0002.jsonl.gz"], {"train": 2}),
        (["train_00000_of_00002.jsonl", "train_00001_of_00002.jsonl"], {"train": 2}),
    ],
)  # fmt: skip
def test_one_file_or_whole_sets_of_shards(names: list[str], splits: dict[str, int]) -> None:
    found, unread = split_files([*reversed(names), "README.md", "other.jsonl", "train.py"])
    assert {split: len(files) for split, files in found.items()} == splits
    assert list(found) == [split for split in ("train", "validation", "test") if split in splits]
    assert sorted(name for files in found.values() for name in files) == sorted(names)
    assert unread == []


def test_shards_come_in_the_order_of_their_numbers() -> None:
    found, _ = split_files([f"train_{i}.jsonl" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)])
    assert found["train"] == [f"train_{i}.jsonl" for i in range(11)]


@pytest.mark.parametrize(
    "name",
    [
        *("train_prefs.jsonl", "train_sft.jsonl", "train_old.jsonl", "train.backup.jsonl"),
        *("train-copy.jsonl", "train (1).jsonl", "train.jsonl.jsonl", "trainer.jsonl"),
        *("train2.jsonl", "training.jsonl", "Train.jsonl", "train_2023.jsonl", "train_10k.jsonl"),
        *("validation_matched.jsonl", "test_prefs.parquet", "dev-clean.jsonl.gz", "train_.jsonl"),
        *("train-00000-of-00001.old.jsonl", "test-gen.jsonl", "train-00000-of-x.jsonl"),
    ],
)
def test_whatever_else_begins_like_a_split_is_named(name: str) -> None:
    assert split_files([name]) == ({}, [name])
    found, unread = split_files(["train.jsonl", "test.jsonl", name])
    assert (found, unread) == ({"train": ["train.jsonl"], "test": ["test.jsonl"]}, [name])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "train.jsonl.gz"], r"train\.jsonl and train\.jsonl\.gz all claim"),
        (["train.jsonl", "train.parquet"], "all claim to be the train split"),
        (["train.parquet", *OF_12], "all claim to be the train split"),
        (["val.jsonl", "dev.jsonl"], "all claim to be the validation split"),
        (["validation.jsonl", "valid.jsonl", "test.jsonl"], "claim to be the validation split"),
        ([*OF_12, "train-00000-of-00001.parquet"], "all claim to be the train split"),
        (["train_0.jsonl", "train-0.jsonl"], "all claim to be the train split"),
        (OF_12[:3] + OF_12[4:], r"shards are missing \(number 3\)"),
        (OF_12[1:], r"shards are missing \(number 0\)"),
        (OF_12[:2], r"shards are missing \(number 2, 3, 4, 5, 6, …\)"),
        (["train-00003-of-00004.parquet"], r"missing \(number 0, 1, 2\)"),
        (["train_0.jsonl", "train_2.jsonl"], r"missing \(number 1\)"),
        (["train-0-of-1.jsonl", "train-00-of-1.jsonl"], "there twice"),
        ([*OF_12, "train-00012-of-00012.parquet"], "number more than 12"),
    ],
)
def test_what_does_not_make_one_split_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(AlignkitError, match=message):
        split_files(names)


def test_the_modules_read_one_file_and_name_the_others(
    tmp_path: Path, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "train_prefs", "train_old", "train.backup", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [GOOD] * 10)
    data = make(HHPreferenceDataModule, tmp_path)
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        data.setup()
    assert data.stats["rows"] == 10
    (told,) = [r.message for r in caplog.records if "not read" in r.message]
    assert "train.backup.jsonl, train_old.jsonl, train_prefs.jsonl" in told
    assert audit(str(tmp_path))["rows"] == 20


def test_a_directory_of_choices_is_an_error_that_lists_them(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    for name in ("train_prefs", "train_sft", "test_prefs"):
        write_jsonl(tmp_path / f"{name}.jsonl", [GOOD] * 10)
    with pytest.raises(
        AlignkitError, match=r"test_prefs\.jsonl, train_prefs\.jsonl, train_sft\.jsonl: not read"
    ) as caught:
        make(HHPreferenceDataModule, tmp_path).setup()
    assert "\n" not in str(caught.value)
    (tmp_path / "test_prefs.jsonl").rename(tmp_path / "test.jsonl")
    with pytest.raises(AlignkitError, match=r"no train split.*train_prefs\.jsonl"):
        make(HHPreferenceDataModule, tmp_path).train_dataloader()
    one = make(HHPreferenceDataModule, tmp_path / "train_prefs.jsonl")
    assert one.train_dataloader() and one.stats["rows"] == 10


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test.jsonl", "test"),
        ("val.jsonl", "val"),
        ("validation-00000-of-00001.jsonl", "validation"),
        ("train.jsonl", ""),
        ("rows.jsonl", ""),
    ],
)
def test_one_file_is_train_alone_whatever_its_name(
    name: str,
    split: str,
    tmp_path: Path,
    make: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Read as both, what is measured would be what is trained, and audit would count it twice."""
    path = write_jsonl(tmp_path / name, [pair(random.Random(i)) for i in range(20)])
    data = make(PreferenceDataModule, path, val_fraction=0.2)
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        data.setup()
    train, held_out = ({str(e) for e in data._sets[s]} for s in ("train", "validation"))
    assert (len(train), len(held_out), len(train & held_out)) == (16, 4, 0)
    told = [r.message for r in caplog.records if "it is train" in r.message]
    assert len(told) == bool(split)
    assert audit(str(path))["rows"] == 20
    if split:
        asked = {"validation": split}
        assert json.dumps(asked) in told[0]
        assert audit(str(path), split=split)["rows"] == 20
        measured = make(PreferenceDataModule, path, splits=asked)
        measured.setup()
        assert len(measured._sets["validation"]) == 20
