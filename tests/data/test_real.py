"""The real pairs and tokenizers, where there are any."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.data.encode.dialogues import DialogueEncoder, DraftExample
from alignkit.data.read.rows import BadRow
from alignkit.data.read.sources import find_splits
from alignkit.data.text.defects import Dropped, Judge, Policies, Tally
from alignkit.data.text.dialogue import Dialogue, messages_of, split_last, text_of
from alignkit.data.text.shapes import Side, preference_sides
from alignkit.tools.audit.command import audit

pytestmark = pytest.mark.real
TOKENIZERS = ("gpt2", "gpt-neox-20b")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, real_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_data / "tokenizers" / request.param)


@pytest.fixture
def pairs(real_data: Path) -> Path:
    return real_data / "data" / "hh-rlhf" / "harmless-base"


def drafts(tokenizer: Any, path: Path, tally: Tally, **options: Any) -> Iterator[DraftExample]:
    encoder = DialogueEncoder(tokenizer, preference_sides, **options)
    for sources in find_splits(str(path)).values():
        for source in sources:
            yield from encoder.drafts(source, tally)


def test_no_boundary_violation_in_2000_pairs(tokenizer: Any, pairs: Path) -> None:
    """Against the plain tokenizer on the whole text, whatever short cut the proof takes."""
    tally = Tally()
    found = list(drafts(tokenizer, pairs, tally, max_length=4096))
    assert len(found) == 1996 and "boundary" not in tally.counts
    texts = [
        draft.text.prompt + "".join(response)
        for draft in found
        for response in draft.text.responses
    ]
    together = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    for draft in found:
        for response in draft.responses:
            assert next(together) == [*draft.prompt, *response[:-1]]


def test_at_256_no_answer_that_fits_is_lost(tokenizer: Any, pairs: Path) -> None:
    tally = Tally(lines_kept=None)
    whole, short = (
        {draft.line: draft for draft in drafts(tokenizer, pairs / "train.jsonl.gz", counts, **fit)}
        for counts, fit in ((Tally(), {"max_length": 4096}), (tally, {"max_length": 256}))
    )
    assert len(whole) == 1796
    for line, draft in whole.items():
        fits = max(map(len, draft.responses)) <= 256
        assert (line in short) == fits
        if fits:
            kept = short[line]
            assert kept.responses == draft.responses
            assert kept.responses[0] != kept.responses[1]
            assert kept.prompt == draft.prompt[len(draft.prompt) - len(kept.prompt) :]
            assert kept.prompt or max(map(len, kept.responses)) == 256
    assert tally.counts["truncated"] > 400


def test_the_audit(real_data: Path, pairs: Path, tmp_path: Path) -> None:
    report = audit(str(pairs), tokenizer=str(real_data / "tokenizers" / "gpt2"))
    expected = {
        "rows": 2000,
        "bad_rows": 0,
        "identical_pairs": 0,
        "differing_prompts": 5,
        "empty_answers": 4,
        "roles_inside_answer": 23,
        "repeated_prompts": 1,
        "truncated": 68,
        "boundary": 0,
    }
    assert {name: report[name] for name in expected} == expected
    assert report["row_numbers"]["empty_answers"] == [76, 449, 805, 956]
    # Against the published text itself.
    rows = []
    for split in ("train", "test"):
        with gzip.open(pairs / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    answers = [
        [row[side][row[side].rindex("Assistant:") + 10 :] for side in ("chosen", "rejected")]
        for row in rows
    ]
    # In rows 694 and 1727 the label stands in the middle of a line; in row 1346 an `Assistant:`
    # after a single line break belongs to the answer, where it opens a line, and splits nothing.
    roles = [i for i, both in enumerate(answers, 1) if any("Human:" in each for each in both)]
    assert report["row_numbers"]["roles_inside_answer"] == sorted({*roles, 1346} - {694, 1727})
    assert 0.3 < report["prompt_sharing"]["saved_share"] < 0.4


def test_messages_are_written_back_character_for_character(pairs: Path) -> None:
    """All 4,000 dialogues, whose messages are those that a chat template gets but for spaces."""
    texts = []
    for split in ("train", "test"):
        with gzip.open(pairs / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)[side] for line in file for side in ("chosen", "rejected")]
    assert len(texts) == 4000
    for text in texts:
        messages = messages_of(text)
        assert text_of(messages) == text
        assert {message.role for message in messages} == {"user", "assistant"}
        prompt, answer = split_last(text)
        dialogue = Dialogue(prompt, (answer,))
        told = [*dialogue.history(), *dialogue.said()]
        assert [(each.role, each.content) for each in told] == [
            (each.role, each.content.strip()) for each in messages
        ]


def test_what_repairs_change(pairs: Path) -> None:
    """Of 4,000 answers 33 are repaired, each at a label that opens it or a line of it."""
    judge = Judge("pairs", Policies(), Tally())
    repaired = 0
    for sources in find_splits(str(pairs)).values():
        for line, row in (each for source in sources for each in source.rows()):
            assert not isinstance(row, BadRow)
            try:
                dialogue = judge.settle(preference_sides(row), line)
            except Dropped:
                continue
            for key, answer in zip(("chosen", "rejected"), dialogue.answers, strict=True):
                assert row[key].startswith(dialogue.prompt)
                rest = row[key].removeprefix(dialogue.prompt)
                if rest == answer:
                    continue
                repaired += 1
                led = re.match(r"\s*(Human|Assistant):", rest)
                cut = re.search(r"\n *(Human|Assistant):", rest)
                assert (led or cut) and answer.strip() in rest
    assert repaired == 33


def test_the_seed_formats_figure(tokenizer: Any, pairs: Path) -> None:
    """The share of rows that `alignkit.data.text.formats` names in its documentation."""
    tally = Tally()
    kept = list(drafts(tokenizer, pairs, tally, max_length=512, prompt_format="stripped"))
    assert tally.counts["boundary"] / len(kept) > 0.998


PIECES = st.text(
    st.sampled_from([*" \n\t:;.,!?'’)\"-", *"aAé́0½中😀\u200b\u00a0\u0338", "\r", "_"]), max_size=12
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=PIECES, answers=st.lists(PIECES, min_size=2, max_size=3))
def test_the_proofs_short_cut_agrees_with_the_long_way(
    tokenizer: Any, asked: str, answers: list[str]
) -> None:
    encoder = DialogueEncoder(tokenizer, preference_sides, max_length=4096)
    sides = [Side(f"\n\nHuman: {asked}\n\nAssistant:", answer) for answer in answers]
    draft = DraftExample(1, Dialogue(sides[0].prompt, tuple(answers)))
    encoder.encode([draft])
    short = draft.proved
    apart = [draft.prompt, *[response[:-1] for response in draft.responses]]
    plain = tokenizer([sides[0].prompt, *answers], add_special_tokens=False)["input_ids"]
    together = tokenizer([s.prompt + s.answer for s in sides], add_special_tokens=False)[
        "input_ids"
    ]
    sound = together == [plain[0] + each for each in plain[1:]]
    assert not short or sound, "certified, but the ids differ"
    if sound:
        assert apart == plain
    leads = all(whole[: len(plain[0])] == plain[0] for whole in together)
    assert (draft.violation is None) == leads
    if leads:
        assert [draft.prompt + answer for answer in apart[1:]] == together
