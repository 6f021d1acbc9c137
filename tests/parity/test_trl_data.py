"""The installed trl's preparation of the same pairs, beside ours: where and why they differ."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides
from alignkit.engine import Example

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

KEEP = Policies(
    differing_prompts="keep",
    roles_inside_answer="keep",
    empty_answers="keep",
    identical_pairs="keep",
)


def prepared_by_trl(
    rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """Rows through the installed DPOTrainer's own preparation."""
    datasets.disable_progress_bars()
    settings = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    numbered = [{**row, "number": number} for number, row in enumerate(rows, start=1)]
    prepare = trl.DPOTrainer._prepare_dataset
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return list(
        prepare(trainer, datasets.Dataset.from_list(numbered), tokenizer, settings, "train")
    )


def prepared_by_us(
    rows: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    policies: Policies = KEEP,
) -> dict[int, Example]:
    encoder = DialogueEncoder(tokenizer, preference_sides, max_length=max_length, policies=policies)
    source = Source("rows", "0", lambda: enumerate(rows, start=1))
    return {draft.line: encoder.example(draft) for draft in encoder.drafts(source, Tally())}


@dataclass
class Comparison:
    """Pairs by what differs; ``same_tokens``: prompt + answer are the same ids in all."""

    pairs: int = 0
    same_tokens: int = 0
    same_split: int = 0
    prompt_swallows_answer: int = 0
    prompt_is_shorter: int = 0


def compare(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Comparison:
    ours = prepared_by_us(rows, tokenizer, 10**6)
    found = Comparison()
    for theirs in prepared_by_trl(rows, tokenizer, 10**6):
        example = ours[theirs["number"]]
        whole = [[*theirs["prompt_ids"], *theirs[f"{side}_ids"]] for side in ("chosen", "rejected")]
        found.pairs += 1
        found.same_tokens += whole == [[*example.prompt, *each] for each in example.responses]
        split = len(theirs["prompt_ids"]) - len(example.prompt)
        found.same_split += split == 0
        found.prompt_swallows_answer += split > 0
        found.prompt_is_shorter += split < 0
    return found


Q = "\n\nHuman: Bread?\n\nAssistant:"


def test_by_hand(tokenizer_dir: Path) -> None:
    """Both answers begin ` I bake`: trl takes that for the prompt's end, and never trains on it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = [
        {"chosen": f"{Q} I bake bread.", "rejected": f"{Q} I bake yeast."},
        {"chosen": f"{Q} yeast", "rejected": f"{Q} water"},
    ]
    theirs = prepared_by_trl(rows, tokenizer, 500)
    assert theirs[0]["prompt"] == f"{Q} I bake"
    ours = prepared_by_us(rows, tokenizer, 500)
    assert tokenizer.decode(ours[1].prompt) == Q
    assert tokenizer.decode(ours[1].responses[0]) == " I bake bread.<|endoftext|>"
    assert theirs[1]["prompt"] == Q
    assert compare(rows, tokenizer) == Comparison(2, 2, 1, 1, 0)


def test_a_long_prompt_by_hand(tokenizer_dir: Path) -> None:
    """trl drops a pair whose prompt fills max_length; we shorten the prompt by its old turns."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    old = "\n\nHuman: " + "yeast " * 80 + "\n\nAssistant: water."
    rows = [{"chosen": f"{old}{Q} yeast", "rejected": f"{old}{Q} water"}]
    assert prepared_by_trl(rows, tokenizer, 64) == []
    (example,) = prepared_by_us(rows, tokenizer, 64).values()
    assert tokenizer.decode(example.prompt) == Q
    assert [tokenizer.decode(each) for each in example.responses] == [
        " yeast<|endoftext|>",
        " water<|endoftext|>",
    ]


@dataclass(frozen=True)
class Cost:
    """Pairs that a ``max_length`` costs either side."""

    trl_drops: int
    trl_cuts: int
    we_drop: int


AT_256 = {"gpt2": Cost(245, 229, 27), "gpt-neox-20b": Cost(250, 222, 14)}


def real_pairs(real_data: Path) -> list[dict[str, str]]:
    """Both splits."""
    rows: list[dict[str, str]] = []
    for split in ("train", "test"):
        path = real_data / "data" / "hh-rlhf" / "harmless-base" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(AT_256))
def test_real_pairs(real_data: Path, name: str) -> None:
    """Every token of 2,000 pairs agrees; trl's prompt swallows the start of 236 pairs' answers."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    assert compare(real_pairs(real_data), tokenizer) == Comparison(2000, 2000, 1764, 236, 0)


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(AT_256))
def test_real_pairs_at_256(real_data: Path, name: str) -> None:
    """trl drops long prompts and cuts answers; we drop none but answers that cannot fit."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    rows = real_pairs(real_data)
    whole = {each["number"]: each for each in prepared_by_trl(rows, tokenizer, 10**6)}
    theirs = {each["number"]: each for each in prepared_by_trl(rows, tokenizer, 256)}
    dropped = whole.keys() - theirs.keys()
    assert dropped == {n for n, each in whole.items() if len(each["prompt_ids"]) >= 256}
    # Its collator keeps the first max_length tokens of prompt and answer ("keep_start").
    cut = [
        each
        for each in theirs.values()
        if len(each["prompt_ids"]) + max(len(each["chosen_ids"]), len(each["rejected_ids"])) > 256
    ]
    complete = prepared_by_us(rows, tokenizer, 10**6)
    ours = prepared_by_us(rows, tokenizer, 256)
    too_long = {n for n, each in complete.items() if max(map(len, each.responses)) > 256}
    assert complete.keys() - ours.keys() == too_long
    assert all(each.responses == complete[n].responses for n, each in ours.items())
    assert Cost(len(dropped), len(cut), len(too_long)) == AT_256[name]
