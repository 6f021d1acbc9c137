"""The demo's preference set: large, varied, fair, and split by subject."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from alignkit.tools.demo.preferences import load_subjects, write_preferences

Pairs = list[dict[str, str]]


def read(directory: Path, split: str) -> Pairs:
    lines = (directory / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pairs]:
    directory = tmp_path_factory.mktemp("preferences")
    write_preferences(directory)
    return {split: read(directory, split) for split in ("train", "test")}


def answer(dialogue: str) -> str:
    return dialogue.rpartition("Assistant:")[2]


def test_every_subject_has_four_whole_facts() -> None:
    for subject in load_subjects():
        assert len(subject.facts) == 4, subject.name
        for question, reply in subject.facts:
            assert question.endswith("?"), question
            assert reply.endswith("."), reply
            assert len(reply.split()) >= 12, reply


def test_there_are_enough_pairs(splits: dict[str, Pairs]) -> None:
    assert len(splits["train"]) >= 500
    assert len(splits["test"]) >= 100


def test_every_pair_is_hh_format_and_shares_its_prompt(splits: dict[str, Pairs]) -> None:
    for pair in splits["train"] + splits["test"]:
        assert pair.keys() == {"chosen", "rejected"}
        prompts = {text.rpartition("Assistant:")[0] for text in pair.values()}
        assert len(prompts) == 1
        assert prompts.pop().startswith("\n\nHuman: ")
        for text in pair.values():
            assert answer(text).startswith(" ")
            assert len(answer(text).split()) >= 5
            assert "{" not in answer(text).replace("\\d{", "")


def test_no_pair_and_no_rejected_answer_comes_twice(splits: dict[str, Pairs]) -> None:
    pairs = splits["train"] + splits["test"]
    assert len({pair["chosen"] for pair in pairs}) == len(pairs)
    rejected = Counter(answer(pair["rejected"]) for pair in pairs)
    assert rejected.most_common(1)[0][1] == 1


def test_test_answers_are_never_seen_in_training(splits: dict[str, Pairs]) -> None:
    facts = [fact for subject in load_subjects() for fact in subject.facts]
    seen = {
        split: {f.answer for f in facts if any(f.answer in p["chosen"] for p in pairs)}
        for split, pairs in splits.items()
    }
    assert seen["train"] | seen["test"] == {fact.answer for fact in facts}
    assert not seen["train"] & seen["test"]


def test_length_does_not_give_the_chosen_answer_away(splits: dict[str, Pairs]) -> None:
    """Guessing "the longer one" or "the shorter one" is right about as often as a coin."""
    pairs = splits["train"] + splits["test"]
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    assert 0.35 < longer / len(pairs) < 0.65
    words = [sum(len(answer(p[side]).split()) for p in pairs) for side in ("chosen", "rejected")]
    assert words[1] == pytest.approx(words[0], rel=0.1)


def test_the_seed_decides_everything(tmp_path: Path, splits: dict[str, Pairs]) -> None:
    write_preferences(tmp_path / "again", seed=0)
    write_preferences(tmp_path / "other", seed=1)
    assert read(tmp_path / "again", "train") == splits["train"]
    assert read(tmp_path / "other", "train") != splits["train"]
