"""Fields that change what is trained are read or refused; the others are told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.cli import main
from alignkit.data import HHPreferenceDataModule, HHSFTDataModule, OpenWebTextDataModule, Policies
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from tests.data.conftest import write_jsonl
from tests.data.test_encode import TEMPLATE, encode

USER = {"role": "user", "content": "q"}


def says(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def scored(tokenizer: Any, row: Any, sides: Any = sft_sides, **options: Any) -> list[str]:
    """The texts of a row that carry loss, EOS left out; nothing for a row that goes."""
    examples, _ = encode(tokenizer, row, sides=sides, **options)
    texts = []
    for example in examples:
        (response,) = example.responses
        mask = example.scored[0] if example.scored is not None else [True] * len(response)
        kept = [token for token, flag in zip(response, mask, strict=True) if flag]
        texts += tokenizer.decode(kept).replace(tokenizer.eos_token, " ").split()
    return texts


@pytest.mark.parametrize("form", ["boundary", "chat"])
@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
class TestWeights:
    def test_turns_that_are_not_to_be_trained_on(
        self, tokenizer: Any, form: Any, off: dict[str, Any]
    ) -> None:
        for marks in ("100", "010", "110", "101", "011", "000", "111"):
            turns = [says(f"answer{i}", **({} if m == "1" else off)) for i, m in enumerate(marks)]
            row = {"messages": [each for turn in turns for each in (USER, turn)]}
            wanted = [f"answer{i}" for i, mark in enumerate(marks) if mark == "1"]
            options = {"prompt_format": form}
            assert scored(tokenizer, row, all_turns=True, **options) == wanted, marks
            assert scored(tokenizer, row, **options) == (["answer2"] if marks[2] == "1" else [])

    def test_what_goes_is_counted(self, tokenizer: Any, form: Any, off: dict[str, Any]) -> None:
        row = {"messages": [USER, says("a", **off)]}
        _, tally = encode(tokenizer, row, sides=sft_sides, prompt_format=form)
        assert tally.counts == {"rows": 1, "unwanted_answers": 1, "dropped": 1}
        policies = Policies(unwanted_answers="error")
        with pytest.raises(AlignkitError, match=r"rows.jsonl:1: marked as not to be trained on"):
            encode(tokenizer, row, sides=sft_sides, prompt_format=form, policies=policies)
        pair = {"chosen": [USER, says("a", **off)], "rejected": [USER, says("b")]}
        assert encode(tokenizer, pair, prompt_format=form)[1].counts["unwanted_answers"] == 1

    def test_the_context_of_a_shorter_dialogue_carries_no_loss(
        self, tokenizer: Any, form: Any, off: dict[str, Any]
    ) -> None:
        """Where old turns are dropped, the marks stay with their turns."""
        turns = [says("old " * 30, **off), says("dull", **off), says("new"), says("last")]
        row = {"messages": [each for turn in turns for each in (USER, turn)]}
        options = {"prompt_format": form, "all_turns": True, "max_length": 90}
        assert scored(tokenizer, row, **options) == ["new", "last"]


MESSAGE_FIELDS = [
    {"tools": [{"name": "f"}]},
    {"loss_mask": 0},
    {"masked": True},
    {"weight": 0.5},
    {"weight": -1},
    {"weight": "0"},
    {"train": 0},
    {"name": "Bob"},
    {"reasoning_content": "because"},
    {"some_new_field": "x"},
]


@pytest.mark.parametrize("fields", MESSAGE_FIELDS)
@pytest.mark.parametrize("place", ["answer", "context"])
def test_a_message_with_a_field_that_is_not_known_is_refused(
    tokenizer: Any, fields: dict[str, Any], place: str
) -> None:
    answer = says("a", **(fields if place == "answer" else {}))
    before = [USER, says("b", **fields), USER] if place == "context" else [USER]
    (name,) = fields
    for row, sides in [
        ({"messages": [*before, answer]}, sft_sides),
        ({"prompt": before, "completion": [answer]}, sft_sides),
        ({"chosen": [*before, answer], "rejected": [*before, says("c")]}, preference_sides),
        ({"prompt": before, "chosen": [answer], "rejected": "c"}, preference_sides),
        ({"prompt": before, "responses": ["c", [answer]]}, preference_sides),
    ]:
        with pytest.raises(AlignkitError, match=rf"rows.jsonl:1: `{name}`.*unread_fields") as told:
            encode(tokenizer, row, sides=sides)
        assert "\n" not in str(told.value)
        _, tally = encode(tokenizer, row, sides=sides, policies=Policies(unread_fields="drop"))
        assert tally.counts == {"rows": 1, "unread_fields": 1, "dropped": 1}
        kept, tally = encode(tokenizer, row, sides=sides, policies=Policies(unread_fields="keep"))
        assert len(kept) == 1 and tally.counts["unread_fields"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": None, "function_call": None, "name": "", "tools": []},
        {"weight": 1, "train": True},
        {"weight": 1.0, "id": 7, "timestamp": "now", "source": "web"},
    ],
)
def test_fields_that_say_nothing_are_fine(tokenizer: Any, fields: dict[str, Any]) -> None:
    row = {"messages": [USER, says("a", **fields)]}
    assert scored(tokenizer, row) == ["a"]


def test_a_users_message_is_not_trained_on_whatever_it_says(tokenizer: Any) -> None:
    for field in ({"weight": 1}, {"train": True}):
        with pytest.raises(AlignkitError, match="not read, and would change what is trained"):
            encode(tokenizer, {"messages": [{**USER, **field}, says("a")]}, sides=sft_sides)
    row = {"messages": [{**USER, "weight": 0}, says("a")]}
    assert scored(tokenizer, row) == ["a"]


def test_null_content_beside_a_tool_call_names_the_call(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    with pytest.raises(AlignkitError, match=r":1: `messages` has a call of a tool without a `na"):
        encode(tokenizer, {"messages": [USER, call, USER, says("a")]}, sides=sft_sides)


SFT = {"prompt": "Name a fruit.", "completion": "Apple."}
PAIR = {"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Stone."}
TALK = {"messages": [USER, says("Apple.")]}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (row, columns)
        for row in (SFT, PAIR, TALK)
        for columns in (
            {"weight": 0},
            {"weight": 0.5},
            {"train": False},
            {"masked": True},
            {"loss_mask": [0, 1]},
            {"tools": '[{"name": "f"}]'},
            {"tool_calls": [{"name": "f"}]},
            {"function_call": {"name": "f"}},
            {"input": "Only citrus."},
            {"images": ["a.png"]},
            {"kto_tag": False},
            {"isDesirable": False},
            {"Weight": 0},
            {"token-weights": [0, 1]},
            {"is_train": False},
            {"exclude": True},
            {"history": [["a", "b"]]},
            {"good": False},
            {"is_correct": 0},
            {"thumbs_up": "no"},
            {"flagged": True},
        )
    ]
    + [(row, columns) for row in (SFT, TALK) for columns in ({"rejected": True}, {"chosen": False})]
    + [
        (PAIR, {"label": 0}),
        (PAIR, {"label": False}),
        (PAIR, {"label": 1}),
        (SFT, {"label": "maybe"}),
        (PAIR, {"margin": 0.7}),
    ],
)
def test_a_column_that_changes_what_is_trained_is_refused(
    tokenizer: Any, row: dict[str, Any], columns: dict[str, Any]
) -> None:
    sides = preference_sides if "rejected" in row else sft_sides
    (name,) = columns
    with pytest.raises(AlignkitError, match=rf"rows.jsonl:1: `{name}`"):
        encode(tokenizer, {**row, **columns}, sides=sides)


@pytest.mark.parametrize(
    "columns",
    [
        {"weight": 1, "train": True, "masked": False, "tools": [], "tool_calls": None},
        {"kto_tag": True, "isDesirable": True, "sample_weights": 1.0, "exclude": False},
        {"system": "", "input": None, "history": [], "images": []},
        {"input": "Name a fruit.", "instruction": " a fruit. "},
        {"id": 3, "source": "web", "score_chosen": 3.5, "dataset": {"a": 1}},
        {"good": True, "flagged": False, "correct": "B", "helpful": 3, "negative": "no stone"},
    ],
)
def test_columns_that_change_nothing_are_fine(tokenizer: Any, columns: dict[str, Any]) -> None:
    assert len(encode(tokenizer, {**PAIR, **columns})[0]) == 1
    assert scored(tokenizer, {**SFT, **columns}) == ["Apple."]


def test_labels_of_kto(tokenizer: Any) -> None:
    for row in (SFT, TALK):
        assert scored(tokenizer, {**row, "label": True}) == ["Apple."]
        assert scored(tokenizer, {**row, "label": None}) == ["Apple."]
        examples, tally = encode(tokenizer, {**row, "label": False}, sides=sft_sides)
        assert (examples, tally.counts["unwanted_answers"]) == ([], 1)


def test_text_with_a_weight_is_refused(tmp_path: Path, make: Callable[..., Any]) -> None:
    def module(**columns: Any) -> Any:
        rows = [{"text": f"bread and water {i}", **columns} for i in range(30)]
        return make(OpenWebTextDataModule, write_jsonl(tmp_path / "a.jsonl", rows), block_size=16)

    module(label=3, title="a", weight=1).setup()
    for column in ({"weight": 0}, {"loss_mask": [1]}, {"train": False}):
        with pytest.raises(AlignkitError, match=r"a\.jsonl:1: `.*not read"):
            module(**column).setup()


def test_columns_not_read_are_told_once_and_on_every_start(
    tmp_path: Path, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**PAIR, "prompt": f"q {i}", "id": i, "source": "web"} for i in range(30)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    for cls in (HHPreferenceDataModule, HHPreferenceDataModule, HHSFTDataModule):
        caplog.clear()
        with caplog.at_level(logging.INFO, "alignkit.data"):
            make(cls, tmp_path).setup()
        told = [r.message for r in caplog.records if "columns not read: id, source" in r.message]
        assert len(told) == 2, "a line for each of the two files"


def test_the_audit_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [
        {"messages": [USER, says("a")], "id": 1},
        {"messages": [USER, says("a", weight=0)], "id": 1},
        {"messages": [USER, says("a", weight=0.5), USER, says("b", **call)], "id": 1},
        {**SFT, "label": False, "images": ["a.png"], "id": 1},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out.json"
    assert main(["audit", str(path), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    found = {name: report["row_numbers"][name] for name in ("unread_fields", "unwanted_answers")}
    assert found == {"unread_fields": [3, 4], "unwanted_answers": [2, 4]}
    assert report["examples"]["unread_fields"][0]["text"] == "`weight` 0.5"
    assert report["columns_not_read"] == ["id", "images"]
    shown = capsys.readouterr().out
    assert "unread_fields" in shown and "Nothing is read from the columns id, images." in shown
