"""What the assistant thought before it answered trains as the chat template writes it."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.data.text.policies import Policies
from alignkit.errors import AlignkitError
from tests.data.test_chat_models import drafts, ids_of
from tests.data.test_trl_templates import pieces, templates, tokenizer_of

pytest.importorskip("trl", reason="trl is not installed")

KEEP = Policies(templated_text="keep")
ANSWERS = ("Four.", "Six.")
THOUGHTS = ("first I add", "then I double")


def answer(words: str, field: str, thought: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": words}
    if field == "inline":
        return {**said, "content": f"<think>\n{thought}\n</think>\n\n{words}"}
    return {**said, field: thought}


def talk(field: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "2 + 2?"},
        answer(ANSWERS[0], field, THOUGHTS[0]),
        {"role": "user", "content": "3 + 3?"},
        answer(ANSWERS[1], field, THOUGHTS[1]),
    ]


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "inline"])
@pytest.mark.parametrize("name", templates())
def test_the_template_decides_what_trains(name: str, field: str) -> None:
    """Ids are the template's; a thought it leaves out is counted, one it never reads refused."""
    tokenizer = tokenizer_of(name)
    messages = talk(field)
    read = field == "inline" or f".{field}" in tokenizer.chat_template
    read = read or f"'{field}'" in tokenizer.chat_template
    whole = ids_of(tokenizer, messages)
    for all_turns in (False, True):
        try:
            (draft,), tally = drafts(
                tokenizer, [{"messages": messages}], all_turns=all_turns, policies=KEEP
            )
        except AlignkitError as error:
            told = str(error)
            assert told.startswith("rows.jsonl:1: ") and "\n" not in told
            if read:
                assert "renders a prompt differently once its answer follows" in told
            else:
                assert f"`{field}`" in told and "not read" in told
            continue
        assert read, "the thought was swallowed"
        ours = [*draft.prompt, *draft.responses[0]]
        assert ours == whole[: len(ours)] or ours[:-1] == whole
        example = _Example(draft.responses, draft.scored if all_turns else [])
        turns = [tokenizer.decode(ids) for ids in pieces(example)]
        last = len(ANSWERS) - len(turns)
        lost = 0
        for turn, words, thought in zip(turns, ANSWERS[last:], THOUGHTS[last:], strict=True):
            assert turn.index(words) >= max(turn.find(thought), 0)
            lost += thought not in turn
        assert tally.counts.get("unwritten_thoughts", 0) == bool(lost)


class _Example:
    def __init__(self, responses: list[list[int]], scored: list[list[bool]]) -> None:
        self.responses, self.scored = responses, scored


def test_the_thought_of_each_answer_of_a_pair_trains() -> None:
    tokenizer = tokenizer_of("qwen3")
    row = {
        "prompt": talk("inline")[:1],
        "chosen": [answer("4", "reasoning_content", "two and two")],
        "rejected": [answer("5", "reasoning_content", "two and three")],
    }
    (draft,), _ = drafts(tokenizer, [row], pairs=True)
    said = [tokenizer.decode(ids) for ids in draft.responses]
    assert said == [
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        "<think>\ntwo and three\n</think>\n\n5<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("qwen2_5", r"`thinking`: not read"),
        ("qwen3", r"`thinking` \(the chat template reads `reasoning_content`\): not read"),
    ],
)
def test_a_field_that_is_never_read_is_refused(template: str, told: str) -> None:
    with pytest.raises(AlignkitError, match=told):
        drafts(tokenizer_of(template), [{"messages": talk("thinking")}])


def test_a_thought_that_is_left_out_may_be_refused() -> None:
    row = {"messages": talk("reasoning_content")}
    policies = Policies(templated_text="keep", unwritten_thoughts="error")
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: .*a trained turn's thought that the"):
        drafts(tokenizer_of("qwen3"), [row], all_turns=True, policies=policies)
    drafts(tokenizer_of("qwen3"), [row], policies=policies)


def test_what_cannot_be_split_on_all_turns_says_that_the_last_can() -> None:
    row = {"messages": talk("reasoning_content")}
    with pytest.raises(AlignkitError, match=r"use data\.turns=last, a template"):
        drafts(tokenizer_of("qwen3_6"), [row], all_turns=True, policies=KEEP)
    (_,), _ = drafts(tokenizer_of("qwen3_6"), [row], policies=KEEP)
