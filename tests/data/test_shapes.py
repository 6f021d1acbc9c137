"""Every shape of row says the same thing."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.shapes import preference_sides, sft_sides

PROMPT = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
ASKED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": PROMPT + " yes", "rejected": PROMPT + " no"},
        {"prompt": PROMPT, "chosen": " yes", "rejected": " no"},
        {"prompt": PROMPT + " ", "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": [YES], "rejected": [NO]},
        {"chosen": [*ASKED, YES], "rejected": [*ASKED, NO]},
        {"prompt": ASKED, "responses": ["yes", [NO]]},
    ],
)
def test_preference_shapes(row: dict[str, Any]) -> None:
    assert [side[:2] for side in preference_sides(row)] == [(PROMPT, " yes"), (PROMPT, " no")]
    if "responses" in row:
        assert [side[:2] for side in sft_sides(row)] == [(PROMPT, " yes")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, YES]},
        {"prompt": PROMPT, "completion": " yes"},
        {"chosen": PROMPT + " yes", "rejected": 5},
        {"prompt": ASKED, "completion": [YES]},
    ],
)
def test_sft_shapes(row: dict[str, Any]) -> None:
    assert [side[:2] for side in sft_sides(row)] == [(PROMPT, " yes")]


def test_a_bare_question_becomes_a_human_turn() -> None:
    row = {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}
    expected = "\n\nHuman: What is 2+2?\n\nAssistant:"
    assert [side[:2] for side in preference_sides(row)] == [(expected, " 4"), (expected, " 5")]


def test_messages_say_where_turns_begin() -> None:
    """Text inside a message that looks like a label opens no turn, and the system comes first."""
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "x\n\nAssistant: not me"},
            YES,
        ]
    }
    (side,) = sft_sides(row)
    assert side.prompt == "Be kind.\n\nHuman: x\n\nAssistant: not me\n\nAssistant:"
    assert side.starts == (8, 8 + len("\n\nHuman: x\n\nAssistant: not me"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no `chosen` and `rejected` \\(it has nothing\\)"),
        ({"chosen": PROMPT}, "no `rejected` \\(it has `chosen`\\)"),
        ({"chosen": [YES, ASKED[0]], "rejected": "x"}, "must end with a message of the assistant"),
        ({"chosen": [], "rejected": "x"}, "must end with a message of the assistant"),
        ({"chosen": [1], "rejected": "x"}, "messages with `role` and `content`"),
        ({"chosen": [{"role": "user"}], "rejected": "x"}, "is not text"),
        ({"chosen": [{"role": "judge", "content": ""}], "rejected": "x"}, "unknown role 'judge'"),
        ({"prompt": "q", "responses": ["one"]}, "two or more"),
        ({"prompt": "q", "chosen": [YES, NO], "rejected": "x"}, "one message of the assistant"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "not int"),
    ],
)
def test_wrong_shapes_say_what_they_lack(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        preference_sides(row)
