"""Rows in the shapes people have are known by their columns, and read as what they say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.cli import main
from alignkit.data import PreferenceDataModule, SFTDataModule, TextDataModule
from alignkit.data.text.dialogue import Message, RowError
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from alignkit.tools.audit.command import audit
from tests.data.conftest import write_jsonl

Row = dict[str, Any]
ASK = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}
PROMPT = "\n\nHuman: q\n\nAssistant:"
PAIR = {"chosen": "yes", "rejected": "no"}

PAIRS: list[tuple[str, Row, str]] = [
    ("dialogues", {"chosen": PROMPT + " yes", "rejected": PROMPT + " no"}, ""),
    ("prompts", {"prompt": "q", **PAIR}, ""),
    (
        "prompts",
        {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 1},
        "",
    ),
    ("prompts", {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, ""),
    ("prompts", {"prompt": "q", "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]}, "s"),
    ("prompts", {"prompt": PROMPT, "chosen": PROMPT + " yes", "rejected": PROMPT + " no"}, ""),
    ("prompts", {"prompt": "q", "chosen": YES, "rejected": NO}, ""),
    ("ShareGPT", {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "no"}}, ""),
    ("ShareGPT", {"conversations": [SYSTEM, ASK], "chosen": YES, "rejected": "no"}, "s"),
    ("Orca", {"system": "Be kind.", "question": "q", **PAIR}, "s"),
    ("Orca", {"system": "", "question": "q", **PAIR}, ""),
    ("Alpaca", {"instruction": "q", "input": "", **PAIR}, ""),
]
ANSWERS: list[tuple[str, Row, str]] = [
    ("messages", {"messages": [ASK, YES], "prompt": "other"}, ""),
    ("messages", {"messages": [HUMAN, GPT]}, ""),
    ("KTO messages", {"messages": [ASK, YES], "label": True}, ""),
    ("KTO prompts", {"prompt": "q", "completion": "yes", "label": True}, ""),
    ("prompts with completions", {"prompt": "q", "completion": "yes"}, ""),
    ("prompts with responses", {"prompt": "q", "response": "yes"}, ""),
    ("ShareGPT conversations", {"conversations": [HUMAN, GPT]}, ""),
    ("ShareGPT conversations", {"conversations": [{**HUMAN, "from": "system", "value": "Be kind."},
                                                  HUMAN, GPT]}, "s"),
    ("Alpaca", {"instruction": "q", "input": "", "output": "yes"}, ""),
    ("questions", {"question": "q", "answer": "yes"}, ""),
    ("questions", {"system_prompt": "Be kind.", "question": "q", "response": "yes"}, "s"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "row", "system"), PAIRS)
def test_pairs(shape: str, row: Row, system: str) -> None:
    expected = ("Be kind." if system else "") + PROMPT
    sides = preference_sides(row)
    assert [side[:2] for side in sides] == [(expected, " yes"), (expected, " no")]
    assert all(side.shape.startswith(shape) and not side.unread for side in sides)
    assert [side[:2] for side in sft_sides(row)] == [(expected, " yes")]


@pytest.mark.parametrize(("shape", "row", "system"), ANSWERS)
def test_answers(shape: str, row: Row, system: str) -> None:
    (side,) = sft_sides(row)
    assert side[:2] == (("Be kind." if system else "") + PROMPT, " yes")
    assert side.shape.startswith(shape) and not side.unread and side.trained


def test_an_instruction_with_input_and_a_bad_answer() -> None:
    (side,) = sft_sides({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert side.messages == (Message("user", "Add.\n1 and 2"),)
    (side,) = sft_sides({"prompt": "q", "completion": "bad", "label": False})
    assert not side.trained


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (preference_sides, {"messages": [ASK, YES], "label": True}, "it is for KTOModule with"),
        (preference_sides, {"conversations": [HUMAN], "chosen": GPT},
         "no `rejected` .*read as ShareGPT preference pairs"),
        (preference_sides, {"question": "q", "chosen": "a", "worse": "b"}, "no `rejected`.*Orca"),
        (sft_sides, {"instruction": "q", "result": "a"}, "no `output` .*read as Alpaca"),
        (sft_sides, {"text": "hello"}, "it is for a text data module"),
        (sft_sides, {"prompt": "q", "completion": "a", "chosen": "b"},
         "as prompts with completions or as prompts with chosen and rejected"),
        (sft_sides, {"messages": [ASK, YES], "conversations": [HUMAN, {**GPT, "value": "b"}]},
         "as messages or as ShareGPT conversations"),
        (preference_sides, {"prompt": "q", "question": "other", **PAIR}, "or as Orca"),
        (sft_sides, {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}, GPT]},
         "a call of a tool without a `name`"),
        (sft_sides, {"conversations": [HUMAN, {"from": "function_call", "value": "{"}, GPT]},
         "`function_call` is no JSON"),
        (sft_sides, {"messages": [ASK, YES], "tools": "f"}, "`tools` is no JSON"),
        (preference_sides, {"conversations": [HUMAN, GPT], **PAIR}, "ends with the answer"),
        (preference_sides, {"prompt": "q", "chosen": [SYSTEM, YES], "rejected": "no"}, "repeats"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(read: Any, row: Row, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read(row)


def test_the_log_says_once_what_was_read(
    make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"q {i}"}], "chosen": GPT,
         "rejected": {"from": "gpt", "value": "no"}}
        for i in range(30)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # encoded, then opened
        caplog.clear()
        with caplog.at_level(logging.INFO, "alignkit.data"):
            make(PreferenceDataModule, path).setup()
        told = [r.message for r in caplog.records if "read as" in r.message]
        assert len(told) == 1
        assert "30 rows, read as ShareGPT preference pairs, 30 examples; no defects" in told[0]


def test_documents_of_text_or_content(make: Callable[..., Any], tmp_path: Path) -> None:
    rows: list[Row] = [{"content": "bread and water " * 20, "text": None}] * 20
    data = make(TextDataModule, write_jsonl(tmp_path / "a.jsonl", rows), block_size=16)
    data.setup()
    assert data.stats["rows"] == 20
    both = write_jsonl(tmp_path / "b.jsonl", [{"content": "a", "text": "b"}])
    with pytest.raises(AlignkitError, match=r"b\.jsonl:1: the row has `text` and `content`"):
        make(TextDataModule, both).setup()


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "cls", "kind", "shape", "rows"),
    [
        ("sharegpt_preference.json", PreferenceDataModule, "preference", "ShareGPT pref", 50),
        ("ultrafeedback.jsonl", PreferenceDataModule, "preference", "prompts with chosen", 50),
        ("ultrafeedback.jsonl", SFTDataModule, "preference", "messages", 50),
        ("sharegpt_preference.json", SFTDataModule, "preference", "ShareGPT pref", 50),
        ("alpaca.json", SFTDataModule, "sft", "Alpaca instructions", 50),
        ("kto_messages.json", SFTDataModule, "sft", "KTO messages", 25),
    ],
)
def test_real_rows(
    make: Callable[..., Any], real_data: Path, name: str, cls: Any, kind: str, shape: str, rows: int
) -> None:
    path = real_data / "data" / "shapes" / name
    data = make(cls, path, max_length=100_000, tokens_per_batch=200_000)
    data.setup()
    assert data.stats["rows"] == 50
    lost = data.stats.get("unwanted_answers", 0) + data.stats.get("identical_pairs", 0)
    assert data.stats["examples"] == 50 - lost
    report = audit(str(path))
    assert (report["kind"], report["bad_rows"], report["unread_fields"]) == (kind, 0, 0)
    if cls is PreferenceDataModule or kind == "sft":
        (read,) = report["read_as"]
        assert read.startswith(shape) and report["read_as"][read] == 50


@pytest.mark.real
def test_real_tool_calls_are_read(
    make: Callable[..., Any], real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = real_data / "data" / "shapes" / "sharegpt_tools.json"
    with pytest.raises(AlignkitError, match=r"json:1: `tools`: not read"):
        make(SFTDataModule, path, prompt_format="boundary").setup()
    assert main(["audit", str(path)]) == 0
    told = capsys.readouterr().out
    assert "read: 50 as ShareGPT conversations" in told
    assert "bad_rows, row" not in told and "unread_fields, row" not in told


def test_audit_fails_where_no_row_is_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [{"question": "q", "best": "a"}] * 3
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert main(["audit", str(path), "--json", str(tmp_path / "report.json")]) == 1
    out, err = capsys.readouterr()
    assert "bad_rows, row 1: the row has no `answer` (it has `question`, `best`)" in out
    # A slow machine is told of its progress before.
    assert err.splitlines()[-1] == f"alignkit: error: {path}: no row is usable, see above"
    assert '"usable": 0' in (tmp_path / "report.json").read_text()
    write_jsonl(path, [*rows, {"question": "q", "answer": "a"}])
    assert main(["audit", str(path), "--kind", "sft"]) == 0
    write_jsonl(path, [{"prompt": "q", "completion": "a", "label": False}])
    assert main(["audit", str(path)]) == 1, "an answer that nobody wants is none"


def renamed_rows(path: Path, count: int = 30) -> Path:
    rows = [
        {"query": f"q {i}", "better": "yes", "worse": "no", "body": "bread " * 30, "other": "maybe"}
        for i in range(count)
    ]
    return write_jsonl(path, rows)


def test_columns_map_other_names(make: Callable[..., Any], tmp_path: Path) -> None:
    """They are part of what an encoded set is known by, and of the plan a position belongs to."""
    path = renamed_rows(tmp_path / "a.jsonl")
    names = {"prompt": "query", "chosen": "better", "rejected": "worse"}
    one = make(PreferenceDataModule, path, columns=names)
    one.setup()
    assert one.stats["examples"] == 30
    other = make(PreferenceDataModule, path, columns={**names, "rejected": "other"})
    other.setup()
    assert one._content["sources"][0]["examples"] != other._content["sources"][0]["examples"]
    assert one._content["settings"]["columns"] == names
    sft = make(SFTDataModule, path, columns={"question": "query", "answer": "better"})
    sft.setup()
    assert sft.stats["examples"] == 30
    text = make(TextDataModule, path, columns={"text": "body"}, block_size=16)
    text.setup()
    assert text.stats["rows"] == 30


def test_columns_that_are_not_there_or_not_read(make: Callable[..., Any], tmp_path: Path) -> None:
    path = renamed_rows(tmp_path / "a.jsonl")
    with pytest.raises(AlignkitError, match=r"a\.jsonl:1: the row has no `best`, which data\.col"):
        make(SFTDataModule, path, columns={"prompt": "query", "chosen": "best"}).setup()
    with pytest.raises(AlignkitError, match=r"a\.jsonl:1: the row has no `best`, which data\.col"):
        make(TextDataModule, path, columns={"text": "best"}, block_size=16).setup()
    with pytest.raises(AlignkitError, match=r"data\.columns: nothing is read from `promt`"):
        make(SFTDataModule, path, columns={"promt": "query"})
    with pytest.raises(AlignkitError, match=r"data\.columns: `query` stands for two"):
        make(SFTDataModule, path, columns={"prompt": "query", "completion": "query"})
