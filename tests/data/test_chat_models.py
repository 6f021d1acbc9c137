"""Real conversations, long prompts and refusals by the chat templates of well-known models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from tests.data.test_trl_templates import templates, tokenizer_of

# These ask for an answer with the beginning of a thought, and write none where there is none.
UNSPLIT = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano")
UNSPLIT_LAST = {*UNSPLIT, "nemotron_3_super", "nemotron_3_ultra"}
UNSPLIT_ALL = {*UNSPLIT_LAST, "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
NAMES = [name for name in templates() if name not in UNSPLIT_LAST]
TALK = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "It scatters."},
]


def drafts(
    tokenizer: PreTrainedTokenizerBase, rows: list[Any], *, pairs: bool = False, **options: Any
) -> tuple[list[DraftExample], Tally]:
    options.setdefault("max_length", 100_000)
    sides = preference_sides if pairs else sft_sides
    encoder = DialogueEncoder(tokenizer, sides, prompt_format="chat", **options)
    source = Source("rows.jsonl", "0", lambda: enumerate(rows, start=1))
    return list(encoder.drafts(source, tally := Tally())), tally


def ids_of(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"])


def check(tokenizer: PreTrainedTokenizerBase, draft: DraftExample, messages: list[Any]) -> None:
    """The ids are those of the template, up to what it writes after the last turn's end."""
    whole = ids_of(tokenizer, messages)
    ours = [*draft.prompt, *draft.responses[0]]
    if ours[-1] == tokenizer.eos_token_id and ours[:-1] == whole:
        return  # the template ends no turn, so EOS does
    assert ours == whole[: len(ours)]
    left = tokenizer.decode(whole[len(ours) :]).strip()
    assert left in ("", tokenizer.eos_token)


def real_messages(real_data: Path) -> Iterator[list[Any]]:
    for name, key in (("kto_messages.json", "messages"), ("ultrafeedback.jsonl", "messages")):
        text = (real_data / "data/shapes" / name).read_text(encoding="utf-8")
        rows = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
        yield from (row[key] for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_real_rows(name: str, real_data: Path) -> None:
    """Every real conversation, on all turns where the template can be split."""
    tokenizer = tokenizer_of(name)
    talks = [talk for talk in real_messages(real_data) if len(str(talk)) < 2500][:12]
    rows = [{"messages": talk} for talk in talks]
    policies = Policies(empty_answers="keep", templated_text="keep")
    found, _ = drafts(tokenizer, rows, all_turns=name not in UNSPLIT_ALL, policies=policies)
    assert len(found) == len(talks)
    for draft, talk in zip(found, talks, strict=True):
        check(tokenizer, draft, talk)


def test_a_refusal_names_file_and_line() -> None:
    """Gemma's template refuses two questions in a row; the row may be dropped."""
    tokenizer = tokenizer_of("gemma")
    rows = [{"messages": TALK}, {"messages": [TALK[0], TALK[0], TALK[1]]}]
    with pytest.raises(AlignkitError, match=r"rows.jsonl:2: .*the template failed \(.*alternate"):
        drafts(tokenizer, rows)
    (_,), tally = drafts(tokenizer, rows, policies=Policies(bad_rows="drop"))
    assert tally.lines["bad_rows"] == [2]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_is_shortened_in_its_content(name: str) -> None:
    """The header, the system message, and a question that reads like a marker stay in place."""
    tokenizer = tokenizer_of(name)
    question = "bread and salt " * 40 + "user assistant"
    asked = [{"role": "user", "content": question}]
    answers = {"chosen": "It is red.", "rejected": "No."}
    system = [] if re.match("gemma$|gemma_", name) else [{"role": "system", "content": "Be kind."}]
    row = {"prompt": [*system, *asked], **answers}
    (whole,), _ = drafts(tokenizer, [row], pairs=True)
    room = max(map(len, whole.responses))
    (short,), _ = drafts(tokenizer, [row], pairs=True, max_length=room + len(whole.prompt) - 60)
    assert len(short.prompt) == len(whole.prompt) - 60
    text, full = tokenizer.decode(short.prompt), tokenizer.decode(whole.prompt)
    before, _, after = full.partition(question)
    assert text.startswith(before) and text.endswith("user assistant" + after)
    assert question.endswith(text[len(before) : len(text) - len(after)])


WORDS = [
    "a",
    "i",
    "end",
    "assistant",
    "user",
    "think",
    "final",
    "message",
    "e\u0301",
    "x\n\nx",
    "</s",
]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNSPLIT_ALL])
def test_an_answer_is_not_taken_for_the_templates_own_words(name: str) -> None:
    """Whatever it says, all of it carries loss on each turn, and its turn's end with it."""
    tokenizer = tokenizer_of(name)
    policies = Policies(templated_text="keep", roles_inside_answer="keep")
    talks = [[{"role": r, "content": w} for r in ("user", "assistant") * 2] for w in WORDS]
    rows = [{"messages": talk} for talk in talks]
    found, _ = drafts(tokenizer, rows, all_turns=True, policies=policies)
    for draft, talk, words in zip(found, talks, WORDS, strict=True):
        check(tokenizer, draft, talk)
        flags = zip(draft.responses[0], draft.scored[0], strict=True)
        runs = [
            tokenizer.decode([token for token, _ in run])
            for flag, run in groupby(flags, key=lambda each: each[1])
            if flag
        ]
        assert len(runs) == 2
        for run in runs:
            # Before the words there is at most a thought's frame, after them an end token.
            assert re.search(rf"(^|\s|>){re.escape(words)}(<[^\s<>]+>)*$", run), runs
