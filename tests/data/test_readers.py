"""Every format of file gives the same rows, and its damage is one line with a place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignkit.data import HHPreferenceDataModule, TextDataModule
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.files import directory_splits, file_source
from alignkit.data.read.rows import BadRow
from alignkit.data.text.policies import Tally
from alignkit.data.text.shapes import Side
from alignkit.errors import AlignkitError

ROWS = [
    {"chosen": f"\n\nHuman: é {i}\n\nAssistant: b", "rejected": f"\n\nHuman: é {i}\n\nAssistant: c"}
    for i in range(20)
]


def everything(_: Any) -> list[Side]:
    """A reader of rows that takes any, so that only files are at fault."""
    return [Side("\n\nHuman: q\n\nAssistant:", " a")]


def written(rows: list[dict[str, str]], suffix: str) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if suffix == "parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def packed(content: bytes, packing: str) -> bytes:
    import pyarrow as pa

    if packing == ".gz":
        return gzip.compress(content, mtime=0)
    if packing == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return bytes(sink.getvalue())
    return content


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows_and_trains(
    make: Callable[..., Any], tmp_path: Path, suffix: str, packing: str
) -> None:
    path = tmp_path / f"train.{suffix}{packing}"
    path.write_bytes(packed(written(ROWS, suffix), packing))
    assert [row for _, row in file_source(path).rows()] == ROWS
    assert list(directory_splits(tmp_path)) == ["train"]
    data = make(HHPreferenceDataModule, tmp_path)
    data.setup()
    assert data.stats["examples"] == 20


def test_places_are_lines_of_a_csv_and_row_numbers_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\n\nlast,2\n')
    rows = list(file_source(tmp_path / "a.csv").rows())
    assert rows == [(2, {"text": "two\nlines", "n": "1"}), (5, {"text": "last", "n": "2"})]
    (tmp_path / "a.json").write_text('\ufeff [{"a": 1}, 3,\n{"a": "]["}]\n')
    assert list(file_source(tmp_path / "a.json").rows()) == [
        (1, {"a": 1}),
        (2, BadRow("a JSON object is needed, not int")),
        (3, {"a": "]["}),
    ]
    (tmp_path / "b.json").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(file_source(tmp_path / "b.json").rows()) == [(1, {"a": 1}), (3, {"a": 2})]


def test_an_array_is_read_in_pieces(tmp_path: Path) -> None:
    """Rows that lie across the pieces that are read, one of them longer than many pieces."""
    rows = [{"a": 'é\\"[]{},' * (i * 997 % 400), "n": i, "x": [{"y": None}]} for i in range(300)]
    rows[7]["a"] = "long " * 2**18
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent))
        assert [row for _, row in file_source(path).rows()] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "a.json: the file holds no rows"),
        ("a.json", b'[{"a": 1}, {"a" 2}, {"a": "' + b"x" * 99, "a.json:2: row 2 of the array: not"),
        ("a.json", b'[{"a": 1}, {"a": 2}', "a.json:3: .*bracket is missing before"),
        ("a.json", b'[{"a": 1}, {"a": "2', "a.json:2: .*not JSON"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "a.json:2: .*a comma"),
        ("a.json", b'[{"a": 1}]]', "a.json:2: .*follows the array"),
        ("a.json", b'[{"a": 1}, {"a": "\xff"}]', "a.json:1: not UTF-8"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "a.json:1: .*nested too deeply"),
        ("a.json", b'{\n "a": 1\n}\n', "a.json:1: not JSON"),
        ("a.csv", b"chosen,rejected\n", "a.csv: the file holds no rows"),
        ("a.csv", b"chosen,chosen\nb,c\n", "a.csv:1: the header has two columns `chosen`"),
        ("a.csv", b"chosen,\nb,c\n", "a.csv:1: the header has a column without a name"),
        ("a.csv", b"chosen,rejected\nb\n", "a.csv:2: 1 values for 2 columns"),
        ("a.csv", b'chosen,rejected\n"b,c\n', "a.csv:2: not readable as CSV"),
        ("a.csv", b"chosen,rejected\n\xff,c\n", r"a.csv:\d: not UTF-8"),
        ("a.jsonl.zst", b"junk", "a.jsonl.zst:1: damaged zstd data"),
        ("a.csv.gz", b"junk", "a.csv.gz:1: damaged gzip data"),
        (
            "a.parquet.gz",
            gzip.compress(b"junk", mtime=0),
            "a.parquet.gz:1: not readable as Parquet",
        ),
        ("a.json.zst", packed(b'[{"a": 1}]' * 99, ".zst")[:-9], "damaged zstd data"),
    ],
)
def test_damage_is_one_line(
    tokenizer_dir: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    encoder = DialogueEncoder(tokenizer, everything, max_length=64)
    with pytest.raises(AlignkitError, match=message) as caught:
        list(encoder.drafts(file_source(tmp_path / name), Tally()))
    assert "\n" not in str(caught.value)


def test_a_folder_of_documents(make: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.{'md' if number % 2 else 'txt'}").write_text("bread and water " * 9)
    data = make(TextDataModule, folder, block_size=16)
    data.setup()
    assert data.stats["rows"] == 30
    before = directory_splits(folder)["train"][0].digest
    (folder / "03.md").write_bytes(b"\xff")
    assert directory_splits(folder)["train"][0].digest != before
    with pytest.raises(AlignkitError, match=r"texts:4: 03\.md is not UTF-8"):
        make(TextDataModule, folder, block_size=16).setup()
    (folder / "train_old.jsonl").write_text("{}")
    with pytest.raises(AlignkitError, match=r"train_old\.jsonl: not read"):
        directory_splits(folder)
