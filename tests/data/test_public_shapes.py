"""Rows in the shapes of public data sets are read right, or refused in a line that helps."""

# ruff: noqa: E501
# A row on a line or two reads as its data set publishes it.

from __future__ import annotations

from typing import Any

import pytest

from alignkit.data.encode.columns import named_row
from alignkit.data.read.rows import BadRow
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.recognise import kind_of
from alignkit.data.text.shapes import Side, preference_sides, sft_sides

Row = dict[str, Any]


def user(content: str, **fields: Any) -> Row:
    return {"role": "user", "content": content, **fields}


def bot(content: str, **fields: Any) -> Row:
    return {"role": "assistant", "content": content, **fields}


A, B = [user("q"), bot("a")], [user("q"), bot("b")]
RATED = {"annotations": {"helpfulness": {"Rating": "1"}}, "model": "m", "principle": "p"}

# The conversation up to the answer, then the answers: one for SFT, more for pairs.
READ: dict[str, tuple[Row, list[str], list[str]]] = {
    "capybara": (
        {"source": "x", "conversation": [{"input": "q", "output": "r"}, {"input": "s", "output": "a"}]},
        ["q", "r", "s"], ["a"],
    ),
    "capybara pairs": (
        {"conversation": [{"input": "q", "output": "a"}], "original_response": "a", "prompt": "q",
         "chosen": A, "rejected": B, "rating_chosen": 5, "chosen_model": "m"},
        ["q"], ["a", "b"],
    ),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "qa"}, ["q\nc"], ["a"]),
    "slim orca": (
        {"conversations": [{"from": "system", "value": "s", "weight": None},
                           {"from": "human", "value": "q", "weight": 0.0},
                           {"from": "gpt", "value": "a", "weight": 1.0}]},
        ["s", "q"], ["a"],
    ),
    "ultrachat": ({"prompt": "q", "prompt_id": "1", "messages": [*A, user("r"), bot("c")]},
                  ["q", "a", "r"], ["c"]),
    "open orca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, ["s", "q"], ["a"]),
    "orca pairs": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ["s", "q"], ["a", "b"]),
    "distilabel orca": (
        {"system": "s", "input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"],
         "order": ["chosen", "rejected"], "rating": [9.0, 3.0], "rationale": "r", "status": "x"},
        ["s", "q"], ["a", "b"],
    ),
    "distilabel math": (
        {"metadata": "{}", "instruction": "q", "chosen_response": "a", "chosen_rating": 5.0,
         "rejected_response": "b", "rejected_rating": 4.0},
        ["q"], ["a", "b"],
    ),
    "distilabel ratings": ({"instruction": "q", "generations": ["b", "a"], "ratings": [1, 5]}, ["q"], ["a", "b"]),
    "metamath": ({"type": "GSM", "query": "q", "original_question": "o", "response": "a"}, ["q"], ["a"]),
    "gsm8k": ({"question": "q", "answer": "a"}, ["q"], ["a"]),
    "numina": ({"source": "x", "problem": "q", "solution": "a", "messages": A}, ["q"], ["a"]),
    "wildchat": (
        {"conversation_id": "1", "model": "m", "turn": 1, "toxic": False, "redacted": False,
         "conversation": [user("q", country="US", toxic=False, turn_identifier=1, header={"a": "b"}),
                          bot("a", country=None, toxic=False, turn_identifier=1, timestamp="2023")]},
        ["q"], ["a"],
    ),
    "lmsys": ({"conversation_id": "1", "model": "m", "conversation": A, "openai_moderation": []}, ["q"], ["a"]),
    "arena": (
        {"model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j",
         "conversation_a": B, "conversation_b": A, "turn": 1},
        ["q"], ["a", "b"],
    ),
    "arena tie": ({"conversation_a": A, "conversation_b": B, "winner": "tie (bothbad)"}, ["q"], ["a", "a"]),
    "tulu 3": ({"id": "1", "messages": A, "source": "x"}, ["q"], ["a"]),
    "tulu 3 pairs": ({"id": "1", "prompt": "q", "chosen": A, "rejected": B, "chosen_model": "m"}, ["q"], ["a", "b"]),
    "no robots": ({"prompt": "q", "prompt_id": "x", "messages": A, "category": "QA"}, ["q"], ["a"]),
    "helpsteer": ({"prompt": "q", "response": "a", "helpfulness": 3, "verbosity": 1}, ["q"], ["a"]),
    "helpsteer 2 pairs": (
        {"split": "train", "prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2,
         "preference_statement": "Response 2 is better."},
        ["q"], ["a", "b"],
    ),
    "helpsteer 3": (
        {"domain": "general", "context": [user("q"), bot("r"), user("s")], "response1": "a",
         "response2": "b", "overall_preference": -3, "individual_preference": [{"score": -3}]},
        ["q", "r", "s"], ["a", "b"],
    ),
    "nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 2, "good_natured": True,
         "answers": [{"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}]},
        ["q"], ["a", "b"],
    ),
    "safe rlhf": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "is_response_0_safe": False,
         "better_response_id": 1, "safer_response_id": 1},
        ["q"], ["a", "b"],
    ),
    "dpo mix": ({"dataset": "x", "chosen": A, "rejected": B, "chosen_rating": 5.0}, ["q"], ["a", "b"]),
    "ultrafeedback": (
        {"source": "x", "instruction": "q", "models": ["m", "n"], "correct_answers": ["None"],
         "completions": [{**RATED, "response": "b", "fine-grained_score": 1.5, "overall_score": 2.0},
                         {**RATED, "response": "a", "fine-grained_score": 4.5, "overall_score": 8.0}]},
        ["q"], ["a", "b"],
    ),
    "ultrafeedback binarized": (
        {"prompt": "q", "prompt_id": "1", "chosen": A, "rejected": B, "messages": A, "score_chosen": 9.0},
        ["q"], ["a", "b"],
    ),
    "hh": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
           ["q"], ["a", "b"]),
    "full hh": ({"prompt": "\n\nHuman: q\n\nAssistant:", "response": " a", "chosen": " a", "rejected": " b"},
                ["q"], ["a", "b"]),
    "shp": (
        {"post_id": "1", "upvote_ratio": 0.9, "history": "q", "score_A": 3, "score_B": 9,
         "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_ratio": 3.0},
        ["q"], ["a", "b"],
    ),
    "stack exchange paired": (
        {"qid": 1, "question": "q", "date": "2020", "metadata": ["u"], "response_j": "a", "response_k": "b"},
        ["q"], ["a", "b"],
    ),
    "stack exchange": (
        {"qid": 1, "question": "q", "date": "2020",
         "answers": [{"answer_id": 1, "author_id": 2, "pm_score": 0, "selected": False, "text": "b"},
                     {"answer_id": 2, "author_id": 3, "pm_score": 4, "selected": True, "text": "a"}]},
        ["q"], ["a", "b"],
    ),
    "alpaca farm": ({"instruction": "q", "input": "c", "output_1": "b", "output_2": "a", "preference": 2},
                    ["q\nc"], ["a", "b"]),
    "alpaca": ({"instruction": "q", "input": "c", "output": "a", "text": "Below is"}, ["q\nc"], ["a"]),
    "kto mix": ({"prompt": [user("q")], "completion": [bot("a")], "label": True}, ["q"], ["a"]),
    "prompts and completions": ({"prompt": [user("q")], "completion": [bot("a")]}, ["q"], ["a"]),
    "magpie": ({"uuid": "1", "instruction": "q", "response": "a",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
               ["q"], ["a"]),
    "open thoughts": ({"system": "s", "conversations": [{"from": "user", "value": "q"},
                                                        {"from": "assistant", "value": "a"}]},
                      ["s", "q"], ["a"]),
    "open hermes": (
        {"skip_prompt_formatting": False, "model": None, "system_prompt": None, "category": "orca",
         "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ["q"], ["a"],
    ),
    "truthy": ({"id": "1", "system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, ["s", "q"], ["a", "b"]),
    "messages as input": ({"input": [user("q")], "output": "a", "system_prompt": "s"}, ["s", "q"], ["a"]),
    "tools in sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "a"}],
         "tools": '[{"name": "f"}]', "system": "s"},
        ["s", "q", '{"name": "f"}', "4"], ["a"],
    ),
    "calls as answers": (
        {"id": 1, "query": "q", "answers": '[{"name": "f", "arguments": {"x": 1}}]', "tools": '[{"name": "f"}]'},
        ["q"], ['{"name": "f", "arguments": {"x": 1}}'],
    ),
}  # fmt: skip


def asked(side: Side) -> list[str]:
    if side.messages is None:
        return [side.prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")]
    return [message.content for message in side.messages]


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    row, prompt, answers = READ[name]
    assert kind_of(row) == ("sft" if len(answers) == 1 else "preference")
    (side,) = sft_sides(row)
    assert (asked(side), side.reply.content, side.unread) == (prompt, answers[0], ())
    if len(answers) == 1:
        with pytest.raises(RowError):
            preference_sides(row)
        return
    sides = preference_sides(row)
    assert [asked(each) for each in sides] == [prompt] * len(answers)
    assert [each.reply.content for each in sides] == answers


def test_calls_are_calls() -> None:
    (side,) = sft_sides(READ["calls as answers"][0])
    assert '"tool_calls": [{"type": "function"' in side.fields
    assert side.tools == '[{"type": "function", "function": {"name": "f"}}]'


REFUSED: list[tuple[Any, Row, str]] = [
    # What it is nearest to, what is missing, and how to name it.
    (sft_sides, {"problem": "q", "generated_solution": "a", "expected_answer": "4"},
     r"no `answer` .* to be read as questions with answers; .*--data.columns '{\"answer\": \"…\"}' "
     r"\(--columns of audit and judge\)"),
    (sft_sides, {"prompt": "q", "output": "a"},
     r"no `completion` .*prompts with completions; .*--data.columns '{\"completion\""),
    (preference_sides, {"prompt": "q", "response_a": "a", "response_b": "b", "preference": "A"},
     "no `responses` .*--data.columns"),
    (sft_sides, {"system": "s", "chat": "USER: q\n\n\nASSISTANT: a"}, "no `messages` .*--data.columns"),
    (preference_sides, {"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0},
     "no `chosen` and `rejected` .*--data.columns"),
    (sft_sides, {"message_id": "1", "text": "q", "role": "prompter"}, "for a text data module"),
    (sft_sides, {"text": "### Human: q### Assistant: a"}, "for a text data module"),
    (preference_sides, {"chosen": "a", "rejected": "b", "ask": "q"},
     "no `Assistant:`; data.columns may name a `prompt`"),
    # Two readings.
    (sft_sides, {"problem": "q", "solution": "a", "answer": "4"},
     r"\(`problem`, `answer`\) or as .* \(`problem`, `solution`\), which differ; .*data.columns"),
    (sft_sides, {"problem": "q", "solution": "s", "messages": A}, "as messages or as .*which differ"),
    (preference_sides, {"prompt": "q", "conversations": [user("q"), bot("r"), user("s")],
                        "chosen": "a", "rejected": "b"}, "both `prompt` and `conversations`"),
    # Lists that are no ranking.
    (preference_sides, {"question": "q", "answers": ["a", "also a"]}, "no score .*`responses`"),
    (preference_sides, {"prompt": "q", "completions": ["step", "step"], "labels": [True, False]}, "no score"),
    (preference_sides, {"prompt": "q", "responses": [{"text": "b", "votes": 1}, {"text": "a", "votes": 7}]},
     "`votes`, which is no known score"),
    (sft_sides, {"question": "q", "answers": {"text": ["a"], "answer_start": [0]}}, "no score"),
    (sft_sides, {"problem": "q", "generations": ["a", "b"]}, "no `"),
    # Verdicts that say nothing.
    (preference_sides, {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "x"},
     "must be a number"),
    (preference_sides, {"conversation_a": A, "conversation_b": B, "winner": "judge"}, "model_a or model_b"),
    # What is not a dialogue yet.
    (sft_sides, {"prompt": [user("q")]}, "no `completion`"),
    (sft_sides, {"messages": [*A, user("r")]}, "must end with a message of the assistant"),
    (sft_sides, {"conversations": ["q", "a"]}, "must hold messages"),
    (sft_sides, {"id": "1", "data": ["q", "a"]}, "no `messages`"),
    (sft_sides, {"question": "q", "answer": 4}, "must be text"),
    (sft_sides, {"question": "q", "answer": ["a", "b"]}, "must hold messages"),
    (sft_sides, {"query": "q", "answers": "[]", "tools": '[{"name": "f"}]'}, "`messages`"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "row", "message"), REFUSED)
def test_refused(read: Any, row: Row, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        read(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, "`context`"),
        ({"instruction": "q", "output": "a", "history": [["r", "s"]]}, "`history`"),
        ({"messages": A, "chat_template_kwargs": {"enable_thinking": False}}, "`chat_template_kwargs`"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_read_is_told(row: Row, unread: str) -> None:
    assert sft_sides(row)[0].unread == (unread,)


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"solution": "solution"}, "s"),
        ({"problem": "problem", "answer": "answer"}, "4"),
        ({"messages": "messages"}, "a"),
        ({"answer": "generation"}, "g"),
    ],
)
def test_columns_choose_between_two_readings(columns: dict[str, str], answer: str) -> None:
    row = {"problem": "q", "solution": "s", "answer": "4", "messages": A, "generation": "g"}
    named = named_row({**row, "label": True}, columns)
    assert not isinstance(named, BadRow)
    (side,) = sft_sides(named)
    assert (asked(side), side.reply.content) == (["q"], answer)
    named = named_row({**row, "label": False}, columns)
    assert not isinstance(named, BadRow) and not sft_sides(named)[0].trained
