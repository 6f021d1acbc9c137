"""``alignkit audit``: counts, places, and a page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.tools.audit.command import audit
from tests.data.conftest import write_jsonl

Q = "\n\nHuman: q {}\n\nAssistant:"
LONG = "bread and water " * 60


def row(number: int, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": Q.format(number) + chosen, "rejected": Q.format(number) + rejected}


ROWS: list[Any] = [
    row(1, " a", " b"),
    row(2, " same", " same"),
    row(3, "", " b"),
    row(4, " Human: a", " b"),
    row(5, " No.\n\nHuman: why?\n\nAssistant: So.", " Not."),
    row(1, " c", " d"),
    row(7, " " + LONG, " b"),
    {"chosen": 3, "rejected": "x"},
    row(9, " a\u200bb", " <b>bold</b> & more"),
    row(10, " a\x00", " b"),
]
EXPECTED = {
    "identical_pairs": [2],
    "differing_prompts": [5],
    "empty_answers": [3],
    "roles_inside_answer": [4],
    "repeated_prompts": [6],
    "truncated": [7],
    "too_long": [7],
    "bad_rows": [8, 11],
    "unicode_oddities": [9],
    "control_characters": [10],
    "doubled_roles": [],
}


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    path = write_jsonl(tmp_path / "bad.jsonl", ROWS)
    path.write_text(path.read_text() + "not json\n")
    return path


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_counts_and_rows(
    bad_file: Path, tokenizer_dir: Path, tmp_path: Path, with_tokenizer: bool
) -> None:
    out = tmp_path / "out.json"
    flags = ["--tokenizer", str(tokenizer_dir)] if with_tokenizer else []
    status = main(["audit", str(bad_file), "--json", str(out), "--max_length", "130", *flags])
    assert status == 0
    report = json.loads(out.read_text())
    assert report["rows"] == 11
    for name, rows in EXPECTED.items():
        assert (report[name], report["row_numbers"][name]) == (len(rows), rows), name
    assert ("boundary" in report) == with_tokenizer
    assert report["unit"] == ("tokens" if with_tokenizer else "estimated tokens")
    assert report["kind"] == "preference"
    assert report["examples"]["identical_pairs"][0]["row"] == 2
    assert report["repeated_prompt_share"] == pytest.approx(1 / 11)


def test_lengths_against_a_plain_count(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two rows; prompts count once when shared, answers with their EOS."""
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row(2, " bread", " water and salt")])
    report = audit(str(path), tokenizer=str(tokenizer_dir))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    prompts = [count(Q.format(1)), count(Q.format(2))]
    chosen = [count(" a") + 1, count(" bread") + 1]
    rejected = [count(" b") + 1, count(" water and salt") + 1]
    assert report["lengths"]["prompt"]["mean"] == sum(prompts) / 2
    assert report["lengths"]["chosen"]["max"] == max(chosen)
    shared = sum(prompts) + sum(chosen) + sum(rejected)
    assert report["prompt_sharing"] == {
        "tokens_apart": shared + sum(prompts),
        "tokens_shared": shared,
        "saved_share": pytest.approx(sum(prompts) / (shared + sum(prompts))),
    }
    assert report["length_bias"]["rejected_mean"] == sum(rejected) / 2


def test_the_seed_format_fails_the_proof(bad_file: Path, tokenizer_dir: Path) -> None:
    options: dict[str, Any] = {"tokenizer": str(tokenizer_dir)}
    assert audit(str(bad_file), **options)["boundary"] == 0
    row_numbers = audit(str(bad_file), prompt_format="stripped", **options)["row_numbers"]
    assert 7 in row_numbers["boundary"], "` bread` is one token, `bread` after `: ` is not"


def test_kinds_and_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a " * 1200}, {"text": ""}, {"text": "b"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "b"}, {"words": "c"}])
    report = audit(str(tmp_path))
    assert report["kind"] == "text"
    assert {name: rows for name, rows in report["row_numbers"].items() if rows} == {
        "empty_answers": [2],
        "repeated_prompts": [4],
        "bad_rows": [5],
        "truncated": [1],
    }
    assert [(each["first_row"], each["rows"]) for each in report["sources"]] == [(1, 3), (4, 2)]
    assert audit(str(tmp_path), split="test")["rows"] == 2
    with pytest.raises(AlignkitError, match="has train, test"):
        audit(str(tmp_path), split="dev")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"messages": messages}])
    report = audit(str(sft))
    assert (report["kind"], report["rows"], report["bad_rows"]) == ("sft", 1, 0)
    assert "length_bias" not in report


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(bad_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    audit(str(bad_file), html=str(page))
    html = Collector()
    html.feed(page.read_text(encoding="utf-8"))
    assert html.open == []
    assert "<b>bold</b> & more" in html.text, "text from the data is escaped"
    assert "identical_pairs" in html.text and "Sharing each prompt saves" in html.text
    (image,) = html.links
    data = base64.b64decode(re.sub("^data:image/png;base64,", "", image))
    assert data.startswith(b"\x89PNG")


def test_all_bad_and_outputs_refused_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x\ny\n")
    report = audit(str(path), html=str(tmp_path / "a.html"))
    assert (report["rows"], report["bad_rows"]) == (2, 2)
    capsys.readouterr()
    assert main(["audit", str(path), "--json", str(tmp_path)]) == 2
    assert main(["audit", str(tmp_path / "none.jsonl")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("alignkit: error: ") for line in errors)


def test_no_name_is_taken_for_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = tmp_path / "[bold].jsonl"
    path.write_text('{"prompt": "a", "completion": " b", "[/x]": 1}\n')
    assert main(["audit", str(path), "--json", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr().out
    assert "Nothing is read from the columns [/x]." in told.splitlines()
    assert "[bold]" in told
    assert (tmp_path / "out.json").is_file()
    assert main(["audit", str(path), "--json", "x", "--html", "./x"]) == 2
    assert "--html './x': is that of --json, too" in capsys.readouterr().err
