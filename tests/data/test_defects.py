"""A policy per defect, and the counts that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.defects import Dropped, Judge, Policies, Tally, choices, defects
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer

Q = "\n\nHuman: q\n\nAssistant:"
ROWS: dict[str, Any] = {
    "control_characters": {"chosen": f"{Q} a\x00b\ud800", "rejected": f"{Q} c"},
    "unicode_oddities": {"chosen": f"{Q} a\u200bb", "rejected": f"{Q} c"},
    "differing_prompts": {
        "chosen": f"{Q} No.\n\nHuman: why?\n\nAssistant: So.",
        "rejected": f"{Q} Not.",
    },
    "roles_inside_answer": {"chosen": f"{Q} Human: a", "rejected": f"{Q} b"},
    "empty_answers": {"chosen": f"{Q}  ", "rejected": f"{Q} b"},
    "identical_pairs": {"chosen": f"{Q} a", "rejected": f"{Q} a"},
    "doubled_roles": {
        "chosen": f"\n\nHuman: p{Q} a",
        "rejected": f"\n\nHuman: p{Q} b",
    },
}


def settle(row: Any, **policies: Any) -> tuple[Any, Tally]:
    tally = Tally()
    judge = Judge("rows.jsonl", Policies(**policies), tally)
    try:
        return judge.settle(preference_sides(row), 3), tally
    except Dropped:
        return None, tally


@pytest.mark.parametrize("name", ROWS)
def test_each_defect_is_found_alone(name: str) -> None:
    assert defects(preference_sides(ROWS[name])) == [name]
    assert defects(preference_sides({"chosen": f"{Q} a", "rejected": f"{Q} b"})) == []


@pytest.mark.parametrize("name", ROWS)
def test_error_and_drop(name: str) -> None:
    if name == "control_characters":
        assert "keep" not in choices(name)  # no tokenizer could encode it
    with pytest.raises(
        AlignkitError, match=rf"^rows.jsonl:3: .*data.policies.{name} to "
    ) as caught:
        settle(ROWS[name], **{name: "error"})
    assert "\n" not in str(caught.value)
    dialogue, tally = settle(ROWS[name], **{name: "drop"})
    assert dialogue is None
    assert tally.counts == {name: 1, "dropped": 1}
    assert tally.lines[name] == [3]


@pytest.mark.parametrize(
    ("name", "policy", "prompt", "answers"),
    [
        ("control_characters", "repair", Q, (" a b\ufffd", " c")),
        ("differing_prompts", "repair", Q, (" No.", " Not.")),
        (
            "differing_prompts",
            "keep",
            Q,
            (" No.\n\nHuman: why?\n\nAssistant: So.", " Not."),
        ),
        ("roles_inside_answer", "repair", Q, (" a", " b")),
        ("roles_inside_answer", "keep", Q, (" Human: a", " b")),
        ("unicode_oddities", "keep", Q, (" a\u200bb", " c")),
        ("empty_answers", "keep", Q, ("  ", " b")),
        ("identical_pairs", "keep", Q, (" a", " a")),
        ("doubled_roles", "keep", f"\n\nHuman: p{Q}", (" a", " b")),
    ],
)
def test_repair_and_keep(name: str, policy: str, prompt: str, answers: tuple[str, ...]) -> None:
    dialogue, tally = settle(ROWS[name], **{name: policy})
    assert (dialogue.prompt, dialogue.answers) == (prompt, answers)
    assert tally.counts == {name: 1}


def test_prompts_that_never_agree_cannot_be_repaired() -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: x",
        "rejected": "\n\nHuman: b\n\nAssistant: y",
    }
    dialogue, tally = settle(row)
    assert dialogue is None
    assert tally.counts == {"differing_prompts": 1, "dropped": 1}


def test_an_answer_emptied_by_repair_counts_as_empty() -> None:
    row = {"chosen": f"{Q} Human:", "rejected": f"{Q} b"}
    dialogue, tally = settle(row)
    assert dialogue is None
    assert tally.counts == {"roles_inside_answer": 1, "empty_answers": 1, "dropped": 1}


def test_repeated_prompts_keep_the_first() -> None:
    tally = Tally()
    judge = Judge("rows.jsonl", Policies(repeated_prompts="drop"), tally)
    assert [judge.is_repeated(judge.key(Q), line) for line in (1, 2)] == [False, True]
    assert tally.lines == {"repeated_prompts": [2], "dropped": [2]}
    assert not judge.is_repeated(judge.key(f"{Q} b"), 3)


def test_a_prompt_repeats_no_row_that_was_dropped(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The only row of a prompt must not go because one before it had too long an answer."""
    rows = [{"chosen": f"{Q} a{' b' * 90}"}, {"chosen": f"{Q} a"}, {"chosen": f"{Q} c"}]
    policies = Policies(repeated_prompts="drop")
    encoder = DialogueEncoder(
        load_tokenizer(str(tokenizer_dir)), sft_sides, max_length=60, policies=policies
    )
    source = Source("rows.jsonl", "0", lambda: iter(enumerate(rows, start=1)))
    tally = Tally()
    kept = [draft.line for draft in encoder.drafts(source, tally)]
    assert kept == [2]
    assert tally.lines == {
        "rows": [1, 2, 3], "too_long": [1], "repeated_prompts": [3], "dropped": [1, 3],
        "examples": [2],
    }  # fmt: skip


def test_an_unknown_policy_lists_the_choices() -> None:
    with pytest.raises(AlignkitError, match="choose one of drop, error"):
        Policies(too_long="keep")  # type: ignore[arg-type]
