"""Rows as people have them: scores, labels in words, other columns and other names of speakers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import PreferenceDataModule, SFTDataModule
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.shapes import preference_sides, sft_sides

Row = dict[str, Any]
PROMPT = "\n\nHuman: q\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "responses": [{"text": "no", "score": 1}, {"text": "yes", "score": 2}]},
        {"prompt": "q", "responses": [{"response": "no", "rating": "3"},
                                      {"response": "yes", "rating": "10"}]},
        {"prompt": "q", "responses": [{"role": "assistant", "content": "no", "score": -1},
                                      {"role": "assistant", "content": "yes", "score": 0}]},
        {"prompt": PROMPT + " ", "answers": [{"answer": "no", "rank": 7.0},
                                             {"answer": "yes", "rank": 1.0}]},
        {"instruction": "q", "completions": [{"response": "no", "overall_score": 2.5},
                                             {"response": "yes", "overall_score": 9}]},
        {"prompt": "q", "responses": ["no", "yes"], "scores": [0.1, 0.2]},
        {"question": "q", "responses": ["no", "yes"], "ranks": [2, 1]},
        {"prompt": "q", "responses": ["no", "yes", "other"], "scores": [1, 2, 1]},
        {"query": "q", "positive": "yes", "negative": "no"},
        {"question": "q", "response_j": "yes", "response_k": "no", "qid": 7},
        {"prompt": "q", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        {"history": "q", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1},
        {"input": {"messages": TALK[:1], "parallel_tool_calls": True},
         "preferred_output": [{"role": "assistant", "content": "yes"}],
         "non_preferred_output": [{"role": "assistant", "content": "no"}]},
    ],
)  # fmt: skip
def test_pairs_by_scores_and_other_names(row: Row) -> None:
    assert [side[:2] for side in preference_sides(row)] == [(PROMPT, " yes"), (PROMPT, " no")]
    assert sft_sides(row)[0][:2] == (PROMPT, " yes")


def test_the_tools_of_an_input_are_the_rows() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    row = {"input": {"messages": TALK[:1], "tools": tools}, "preferred_output": TALK[1:],
           "non_preferred_output": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    sides = (*preference_sides(row), *sft_sides(row))
    assert [json.loads(side.tools) for side in sides] == [tools] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "not one score for each"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "N/A"]}, "'N/A' .*no number"),
        ({"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "no number"),
        ({"prompt": "q", "responses": [{"words": "a"}, {"words": "b"}]}, "must hold one text"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "0 or 1"),
        ({"input": "q", "preferred_output": "a", "non_preferred_output": "b"}, "holds `messages`"),
        (
            {
                "input": {"messages": TALK[:1], "system": "s"},
                "preferred_output": "a",
                "non_preferred_output": "b",
            },
            "holds system, which",
        ),
    ],
)
def test_scores_that_say_nothing_are_told(row: Row, message: str) -> None:
    with pytest.raises(RowError, match=message):
        preference_sides(row)


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": [{**TALK[0], "role": "User"}, {**TALK[1], "role": "ASSISTANT"}]}, ""),
        ({"messages": [TALK[0], {"from": "bing", "value": "yes"}]}, ""),
        ({"conversations": {"from": ["human", "chatgpt"], "value": ["q", "yes"]}}, ""),
        ({"conversation": [{"input": "q", "output": "yes"}]}, ""),
        ({"messages": TALK, "system": "Be kind."}, "s"),
        ({"messages": [SYSTEM, *TALK], "system": "Be kind."}, "s"),
        ({"prompt": "q", "completion": "yes", "system_prompt": "Be kind."}, "s"),
        ({"prompt": PROMPT, "completion": " yes", "system": "Be kind."}, "s"),
        ({"instruction": "q", "output": "yes"}, ""),
        ({"system": "Be kind.", "question": "q", "response": "yes"}, "s"),
        ({"input": "q", "output": "yes"}, ""),
        ({"problem": "q", "solution": "yes"}, ""),
    ],
)  # fmt: skip
def test_other_names_of_speakers_and_columns(row: Row, system: str) -> None:
    (side,) = sft_sides(row)
    assert side[:2] == (("Be kind." if system else "") + PROMPT, " yes")
    assert not side.unread


def test_two_system_messages_that_differ_are_refused() -> None:
    with pytest.raises(RowError, match="another in its messages"):
        sft_sides({"messages": [SYSTEM, *TALK], "system": "Be rude."})


def test_a_system_column_that_is_no_text_is_refused() -> None:
    for prompt in (PROMPT, "q", [TALK[0]]):
        with pytest.raises(RowError):
            sft_sides({"prompt": prompt, "completion": "yes", "system": ["Be kind."]})


def test_answers_of_one_score_are_no_pair(make: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f'q {i},"[""a"", ""b""]"' for i in range(3)]
    path.write_text("prompt,responses\n" + "\n".join(rows))
    with pytest.raises(Exception, match="`responses` must be a list"):
        make(PreferenceDataModule, path).setup()
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}
    first, second = preference_sides(row)
    assert first.answer == second.answer == " a", "found as a pair of identical answers"


@pytest.mark.parametrize(("yes", "no"), [("true", "False"), ("1", "0"), ("yes", "NO")])
def test_labels_of_a_csv(make: Callable[..., Any], tmp_path: Path, yes: str, no: str) -> None:
    lines = [f"q {i},{'good' if i % 3 else 'bad'},{yes if i % 3 else no}" for i in range(30)]
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\n" + "\n".join(lines))
    data = make(SFTDataModule, path)
    data.setup()
    assert (data.stats["unwanted_answers"], data.stats["examples"]) == (10, 20)
