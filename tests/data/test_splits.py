"""What makes up each split: names of all kinds of sets, and slices of them."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from alignkit.cli import main
from alignkit.data import HHPreferenceDataModule, PreferenceDataModule, TextDataModule
from alignkit.data.deal.stream import shard
from alignkit.data.read import hub
from alignkit.data.read.rows import Source
from alignkit.data.read.slices import Slice, parse_splits, take
from alignkit.data.read.sources import find_splits
from alignkit.errors import AlignkitError
from tests.data.conftest import pair, write_jsonl
from tests.data.test_readers import packed, written

ROWS = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(40)]


def asked(sources: list[Source]) -> list[str]:
    """The prompts of the sources' rows, without their letter."""
    return [row["prompt"][2:] for source in sources for _, row in source.rows()]  # type: ignore[call-overload, index]


def numbers(*counts: int) -> list[str]:
    return [str(i) for i in range(*counts)]


SLICES = ["[:5%]", "[95%:]", "[-10%:]", "[:7]", "[10:20]", "[-3:]", "[:-3]", "[33%:66%]", "[5:99]"]


@pytest.mark.parametrize("told", SLICES)
def test_slices_are_those_of_the_datasets_library(told: str) -> None:
    (part,) = parse_splits({"train": f"rows{told}"})["train"]  # type: ignore[index]
    instruction = datasets.ReadInstruction.from_spec(f"rows{told}")
    for total in (20, 37, 101):
        (theirs,) = instruction.to_absolute({"rows": total})
        assert part.bounds(total) == (theirs.from_, theirs.to)
        rows = [(i + 1, {"prompt": f"q {i}"}) for i in range(total)]
        for cuts in ([total], [0, 5, total - 5], [9, 1, total - 10]):  # as one file, or as shards
            ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
            shards = [
                Source(f"{i}", f"{i}", lambda some=rows[end - size : end]: iter(some))
                for i, (size, end) in enumerate(zip(cuts, ends, strict=True))
            ]
            assert asked(take(shards, part)) == numbers(theirs.from_, theirs.to)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"trian": "train"}, "'trian' is none of train, validation, test; did you mean train"),
        ({"train": "train[5%]"}, "cannot be read; give a split's name"),
        ({"train": "train[:5%"}, "cannot be read"),
        ({"train": ""}, "cannot be read"),
        ({"train": "train[10:50%]"}, "mixes rows and per cent"),
        ({"train": "train[20:10]"}, "takes no row"),
    ],
)
def test_what_is_no_slice_is_refused_before_any_work(
    make: Callable[..., Any], tmp_path: Path, splits: dict[str, str], message: str
) -> None:
    with pytest.raises(AlignkitError, match=f"data.splits: .*{message}"):
        make(PreferenceDataModule, tmp_path / "nothing", splits=splits)


@pytest.mark.parametrize("part", [Slice("train", "50"), Slice("train", "0%", "1%")])
def test_a_slice_without_rows_is_an_error(tmp_path: Path, part: Slice) -> None:
    source = Source("rows.jsonl", "0", lambda: enumerate(ROWS, start=1))
    with pytest.raises(AlignkitError, match=r"takes none of the 40 rows"):
        asked(take([source], part))


def directory_of(kind: str, home: Path) -> Path:
    """A set with the splits ``train_prefs`` (40 rows) and ``test_prefs`` (10), and others."""
    splits = {"train_prefs": ROWS, "test_prefs": ROWS[30:], "train_sft": ROWS[:1]}
    if kind == "saved":
        listed = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        shards = {"train_prefs": 3, "test_prefs": 1, "train_sft": 1}
        datasets.DatasetDict(listed).save_to_disk(str(home), num_shards=shards)
        return home
    suffix, _, packing = kind.partition("+")
    inside = home / "data" if suffix == "parquet" else home
    inside.mkdir(parents=True)
    (home / "README.md").write_text("about")
    for name, rows in splits.items():
        parts = [rows[:4], rows[4:]] if suffix == "parquet" and len(rows) > 4 else [rows]
        for number, some in enumerate(parts):
            place = f"-{number:05d}-of-{len(parts):05d}" if suffix == "parquet" else ""
            path = inside / f"{name}{place}.{suffix}{packing}"
            path.write_bytes(packed(written(some, suffix), packing))
    return home


@pytest.mark.parametrize(
    "kind", ["jsonl", "csv+.gz", "json+.zst", "parquet+", "parquet+.gz", "parquet+.zst", "saved"]
)
def test_splits_of_other_names(make: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    path = directory_of(kind, tmp_path / "set")
    with pytest.raises(AlignkitError, match=r"data\.splits=.\{.train.: .train_") as caught:
        find_splits(str(path))
    assert "\n" not in str(caught.value)
    splits = {"train": "train_prefs[10%:25%]", "validation": "test_prefs[:3]"}
    data = make(PreferenceDataModule, path, splits=splits)
    data.setup()
    assert (len(data._sets["train"]), len(data._sets["validation"])) == (6, 3)
    found = find_splits(str(path), splits={"train": "test_prefs[:2]+train_prefs[-2:]"})
    assert asked(found["train"]) == ["30", "31", "38", "39"]
    with pytest.raises(AlignkitError, match=r"no split train_pref, only .*did you mean train_pref"):
        find_splits(str(path), splits={"train": "train_pref"})


def test_what_is_named_is_all_that_is_told(
    make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another slice is another set of examples; nobody is warned of what was not asked for."""
    path = directory_of("jsonl", tmp_path / "set")
    write_jsonl(path / "train.jsonl", ROWS[:5])
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        one = make(PreferenceDataModule, path, splits={"train": "train_prefs[:50%]"})
        one.setup()
        two = make(PreferenceDataModule, path, splits={"train": "train_prefs[50%:]"})
        two.setup()
    assert not caplog.records
    assert len(one._sets["train"]) + len(one._sets["validation"]) == 20
    contents = [data._content["sources"][0]["examples"] for data in (one, two)]
    assert contents[0] != contents[1]
    assert one._content["settings"]["splits"] == {"train": "train_prefs[:50%]"}
    place = two._sets["train"].place(0)
    assert place[0].endswith("train_prefs.jsonl") and place[1] > 20


def test_a_file_by_its_own_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    splits = {"train": "train[:75%]", "validation": "pairs[75%:]"}
    found = find_splits(str(path), splits=splits)
    assert asked(found["train"]) == numbers(30)
    assert asked(found["validation"]) == numbers(30, 40)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_dataset(make: Callable[..., Any], tmp_path: Path, shards: int) -> None:
    saved = datasets.Dataset.from_list(ROWS).with_format("numpy").select(range(5, 40))
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=shards)
    found = find_splits(str(tmp_path / "saved"))
    assert list(found) == ["train"] and len(found["train"]) == shards
    assert asked(found["train"]) == numbers(5, 40)
    data = make(PreferenceDataModule, tmp_path / "saved")
    data.setup()
    assert data.stats["rows"] == 35
    assert main(["audit", str(tmp_path / "saved"), "--splits", '{"train": "train[:9]"}']) == 0
    digests = [source.digest for source in found["train"]]
    other = datasets.Dataset.from_list([{**row, "chosen": "yea"} for row in ROWS[5:]])
    other.save_to_disk(str(tmp_path / "other"), num_shards=shards)
    found = find_splits(str(tmp_path / "other"))
    assert not set(digests) & {source.digest for source in found["train"]}


def test_a_saved_set_is_read_by_the_standard_names(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict(train=rows, test=rows.select(range(3)), train_sft=rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    found = find_splits(str(tmp_path / "saved"))
    assert {name: len(asked(found[name])) for name in found} == {"train": 40, "test": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", b"{", "not what save_to_disk writes"),
        ("dataset_dict.json", b'{"splits": 3}', "`splits` is not a list"),
        ("dataset_dict.json", b'{"splits": ["../train"]}', "is no name of a file"),
        ("train/state.json", b"[]", "not what save_to_disk writes"),
        ("train/state.json", b'{"_data_files": [{"filename": "/etc/passwd"}]}', "is no name"),
        ("train/state.json", b'{"_data_files": []}', "holds no rows"),
        ("train/data-00000-of-00001.arrow", b"junk", "not readable as Arrow"),
        ("train/data-00000-of-00001.arrow", None, "not readable as Arrow"),
    ],
)
def test_damage_of_a_saved_set_is_one_line(
    make: Callable[..., Any], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "s"))
    file = tmp_path / "s" / name
    file.write_bytes(file.read_bytes()[:-700] if content is None else content)
    with pytest.raises(AlignkitError, match=message) as caught:
        make(PreferenceDataModule, tmp_path / "s").setup()
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_splits_of_a_hub_set(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its configuration; standard names are read unless others are asked for."""

    def load(name: str, configuration: str, *, streaming: bool) -> Any:
        assert (name, configuration) == ("someone/prefs", "en")
        rows = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict(train_prefs=rows, test_prefs=rows.select(range(30, 40)))

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["en", "de"])
    with pytest.raises(AlignkitError, match="only train_prefs, test_prefs; name those to read"):
        make(PreferenceDataModule, "someone/prefs:en").setup()
    splits = {"train": "train_prefs[:25%]", "validation": "test_prefs"}
    data = make(PreferenceDataModule, "someone/prefs:en", splits=splits)
    data.setup()
    assert (len(data._sets["train"]), len(data._sets["validation"])) == (10, 10)
    with pytest.raises(AlignkitError, match="someone/prefs:en has no split train, only train_pre"):
        make(PreferenceDataModule, "someone/prefs:en", splits={"train": "train"}).setup()


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "book.txt.gz", "book.md.zst"])
def test_one_text_is_a_document(make: Callable[..., Any], tmp_path: Path, name: str) -> None:
    packing = "".join(Path(name).suffixes[1:])
    (tmp_path / name).write_bytes(packed(b"\xef\xbb\xbfbread and water\n\n" * 200, packing))
    data = make(TextDataModule, tmp_path / name, block_size=16)
    data.setup()
    assert (data.stats["rows"], data.stats["examples"]) == (1, data.stats["examples"])
    assert data.stats["examples"] > 20
    (tmp_path / name).write_bytes(packed(b"bread \xff", packing))
    with pytest.raises(AlignkitError, match=rf"{name}:1: {name} is not UTF-8 \(byte 7\)"):
        make(TextDataModule, tmp_path / name, block_size=16).setup()


def test_texts_that_name_their_split(
    make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wikitext's files are three splits, not three documents to train on."""
    for name in ("train.txt", "valid.txt", "test.txt", "README.md", "more.txt"):
        (tmp_path / name).write_text("bread and water " * 100)
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        data = make(TextDataModule, tmp_path, block_size=16)
        data.setup()
    assert sorted(data._sets) == ["test", "train", "validation"] and data.stats["rows"] == 1
    (told,) = [record.message for record in caplog.records]
    assert "more.txt: not read" in told and "README" not in told


def test_ranks_of_a_stream_share_rows_of_several_lines(tmp_path: Path) -> None:
    """Each row of this CSV begins on an even line."""
    (tmp_path / "a.csv").write_text("text\n" + '"one\ntwo"\n' * 12)
    (source,) = find_splits(str(tmp_path / "a.csv"))["train"]
    counts = [len(list(shard(source, rank, 2).rows())) for rank in range(2)]
    assert counts == [6, 6]


def test_splits_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    write_jsonl(tmp_path / "train_prefs.jsonl", [pair(rng) for _ in range(20)])
    report = tmp_path / "report.json"
    splits = '{"train": "train_prefs[:50%]"}'
    assert main(["audit", str(tmp_path), "--splits", splits, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["rows"] == 10
    assert main(["audit", str(tmp_path)]) == 2
    assert 'data.splits=\'{"train": "train_prefs"}\'' in capsys.readouterr().err
    assert HHPreferenceDataModule("t", str(tmp_path), splits={"train": "a"}).splits
