"""HH-RLHF's dialogues, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.data.text.dialogue import (
    Dialogue,
    Message,
    RowError,
    common_prompt,
    doubled_roles,
    last_label,
    messages_of,
    split_last,
    text_of,
    turns,
    without_labels,
)

TEXT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what?\n\nAssistant: this"


def test_split_is_after_the_last_label_and_keeps_the_space() -> None:
    assert split_last(TEXT) == (TEXT[: -len(" this")], " this")
    with pytest.raises(RowError, match="no `Assistant:`"):
        split_last("\n\nHuman: hi")


@pytest.mark.parametrize("line", ["\n\n", "\r\n\r\n"])
def test_a_label_in_the_middle_of_an_answer_does_not_split(line: str) -> None:
    prompt = f"{line}Human: Who said so?{line}Assistant:"
    for answer in (
        " The Research Assistant: yes.",
        " Assistant: is a label, I say",
        f" Human: and Assistant: are labels{line}So says the Lab Assistant:",
        "\nAssistant: one line break opens no turn",
        f" I am.{line}Human: thanks",
    ):
        assert split_last(prompt + answer) == (prompt, answer)
        assert common_prompt((prompt + answer, prompt + answer + "?")) == prompt
    with pytest.raises(RowError, match="no `Assistant:` that opens a turn, after an empty line"):
        split_last("\n\nHuman: hi\nThe Research Assistant: yes")


def test_turns_open_after_an_empty_line_only() -> None:
    """A label in the middle of a line, or after a single line break, opens no turn."""
    text = "\n\nHuman: a Human: b\nAssistant: c\n\nAssistant: d"
    assert [(turn.role, turn.text) for turn in turns(text)] == [
        ("Human", " a Human: b\nAssistant: c"),
        ("Assistant", " d"),
    ]
    assert turns("no label at all Assistant:") == []
    assert "".join(f"\n\n{turn.role}:{turn.text}" for turn in turns(TEXT)) == TEXT


@given(
    st.lists(st.sampled_from(["\n\n", "\n", "\r\n", "Human:", "Assistant:", "a", " "])).map("".join)
)
def test_turns_lose_nothing(text: str) -> None:
    found = turns(text)
    starts = [turn.start for turn in found]
    assert starts == sorted(set(starts))
    rebuilt = text[: starts[0]] if found else text
    for turn in found:
        label = text.index(f"{turn.role}:", turn.start)
        rebuilt += text[turn.start : label] + f"{turn.role}:" + turn.text
    assert rebuilt == text
    labels = [turn for turn in found if turn.role == "Assistant"]
    opened = text.index("Assistant:", labels[-1].start) + len("Assistant:") if labels else None
    assert last_label(text) == opened


WORDS = st.text(st.sampled_from("Human:Assistant \n\r\t.?é中🙂\u0301")).filter(
    lambda text: not turns(f"a{text}") and "\n\n" not in f"\n{text}"[-2:]
)


@given(
    st.text("ab \n", max_size=5).filter(lambda text: not text or text.strip()),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), WORDS), min_size=1, max_size=6),
)
def test_messages_are_read_and_written_character_for_character(
    opening: str, spoken: list[tuple[str, str]]
) -> None:
    messages = [Message("system", opening)] if opening else []
    messages += [Message(role, words) for role, words in spoken]
    text = text_of(messages)
    assert text_of(messages_of(text)) == text
    assert messages_of(text) == messages
    rest = text.removeprefix(opening)
    assert rest.count("\n\nHuman:") + rest.count("\n\nAssistant:") == len(spoken)


def test_doubled_roles() -> None:
    assert not doubled_roles(TEXT)
    assert doubled_roles("\n\nHuman: a\n\nHuman: b\n\nAssistant:")
    quoted = Message("user", "a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d")
    assert not doubled_roles("", [Message("system", "s"), quoted])
    assert doubled_roles("", [quoted, quoted]) and doubled_roles("", [Message("assistant", "a")])


def test_common_prompt_finds_where_both_sides_split() -> None:
    """As in HH-RLHF: one side wrote a label inside its answer, so its last split is too late."""
    chosen = "\n\nHuman: q\n\nAssistant: No.  Human: why?\n\nAssistant: So."
    rejected = "\n\nHuman: q\n\nAssistant: Not at all."
    assert common_prompt((chosen, rejected)) == "\n\nHuman: q\n\nAssistant:"
    assert common_prompt(("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: x")) is None


@pytest.mark.parametrize(
    ("answer", "repaired"),
    [
        (" I think so.", " I think so."),
        (" Human: I think so.", " I think so."),
        ("  Human:   Assistant: Yes", " Yes"),
        (" No.  Human: why?\n\nAssistant: So.", " No."),
        (" Human: No.\n\nHuman: why?", " No."),
        (" Well.  \nAssistant:   By the way", " Well."),
        (" Yes.\n\nHuman: The Research Assistant: no\n\nAssistant: So.", " Yes."),
        (" Human:", " "),
        # A label in the middle of a line is somebody's words.
        (" The Research Assistant: yes.", " The Research Assistant: yes."),
        (" Human: No.  Human: why?", " No.  Human: why?"),
        (" The Research Assistant: a\n\nHuman: b", " The Research Assistant: a"),
    ],
)
def test_stray_labels(answer: str, repaired: str) -> None:
    assert without_labels(answer) == repaired


def test_since_keeps_what_precedes_the_first_turn() -> None:
    prompt = "Be kind.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    dialogue = Dialogue(prompt, (" d",))
    later = dialogue.turn_starts()[2]
    assert dialogue.since(later) == "Be kind.\n\nHuman: c\n\nAssistant:"
    assert dialogue.since(0) == prompt
