"""Reading files: every foreseeable damage is one line with its place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import HHPreferenceDataModule, Policies
from alignkit.data.read.files import directory_splits, file_source
from alignkit.data.read.rows import BadRow
from alignkit.errors import AlignkitError
from tests.data.conftest import write_jsonl

GOOD = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
LINE = json.dumps(GOOD).encode() + b"\n"


def test_lines_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE + b"\n  \n" + LINE.rstrip())
    assert [(line, row) for line, row in file_source(path).rows()] == [(1, GOOD), (4, GOOD)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist([GOOD] * 3), path)
    else:
        path.write_bytes(gzip.compress(LINE * 3, mtime=0) if suffix == "jsonl.gz" else LINE * 3)
    assert list(file_source(path).rows()) == [(1, GOOD), (2, GOOD), (3, GOOD)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz: the file holds no rows"),
        ("a.jsonl", LINE + b"not json\n", "a.jsonl:2: not JSON"),
        ("a.jsonl", LINE + LINE[:40], "a.jsonl:2: not JSON"),
        ("a.jsonl", LINE + b'{"rejected": "x"}\n', r"a.jsonl:2: the row has no `chosen`"),
        ("a.jsonl", LINE + b'["chosen"]\n', "a.jsonl:2: a JSON object is needed, not list"),
        ("a.jsonl", LINE + b'{"chosen": 5, "rejected": "x"}\n', "a.jsonl:2: `chosen` must be"),
        (
            "a.jsonl",
            LINE + b'{"chosen": "hello", "rejected": "x"}\n',
            "a.jsonl:2: the dialogue has no `Assistant:`",
        ),
        ("a.jsonl", LINE + LINE.replace(b"b", b"\xff"), "a.jsonl:2: not UTF-8"),
        ("a.jsonl", LINE + LINE.replace(b"b", b"\x00"), "a.jsonl:2: not JSON"),
        ("a.jsonl", LINE + b'{"chosen":' + b"[" * 100_000 + b"\n", "a.jsonl:2: nested too deeply"),
        ("a.jsonl", LINE + b'{"chosen": ' + b"1" * 6000 + b"}\n", "a.jsonl:2: not JSON"),
        ("a.jsonl.gz", gzip.compress(LINE * 50, mtime=0)[:-20], "a.jsonl.gz:[0-9]+: damaged gzip"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz:1: damaged gzip"),
        ("a.parquet", LINE, "a.parquet:1: not readable as Parquet"),
        ("a.xml", LINE, "a.xml: unknown format"),
    ],
)
def test_bad_files_are_one_line(
    make: Callable[..., Any], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AlignkitError, match=message) as caught:
        make(HHPreferenceDataModule, path).setup()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_paths_are_named(make: Callable[..., Any], tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path / "no" / "dir"):
        with pytest.raises(AlignkitError, match="no such file"):
            make(HHPreferenceDataModule, path).setup()
    with pytest.raises(AlignkitError, match=r"no train\.\*, validation\.\* or test\.\* file"):
        make(HHPreferenceDataModule, tmp_path).setup()


def test_bad_rows_are_dropped_and_counted(make: Callable[..., Any], tmp_path: Path) -> None:
    """Lines 2 and 4 of 6 are bad; the other four make the set."""
    path = tmp_path / "a.jsonl"
    other = LINE.replace(b": a", b": d")
    path.write_bytes(LINE + b"{\n" + other + b'{"chosen": 1}\n' + LINE + other)
    data = make(HHPreferenceDataModule, path, policies=Policies(bad_rows="drop"), val_fraction=0.3)
    data.setup()
    assert (data.stats["rows"], data.stats["bad_rows"], data.stats["dropped"]) == (6, 2, 2)
    assert data.stats["examples"] == 4


def test_a_line_of_50_mb_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(LINE + b'{"chosen": "')
        for _ in range(50):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + LINE)
    tracemalloc.start()
    rows = list(file_source(path).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[0] == (1, GOOD) and rows[2] == (3, GOOD)
    assert rows[1] == (2, BadRow("a line of 50 MiB; the limit is 16 MiB"))
    assert peak < 70 * 2**20


def test_splits_of_a_directory(tmp_path: Path) -> None:
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl", "test.jsonl"]
    for name in [*names, "trainer.jsonl", "train.xml", "README.md"]:
        write_jsonl(tmp_path / name, [GOOD])
    splits = directory_splits(tmp_path)
    assert {name: len(sources) for name, sources in splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert list(splits) == ["train", "validation", "test"]
