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

from alignkit.data.defects import Policies, Tally
from alignkit.data.encode import DialogueEncoder
from alignkit.data.files import Source
from alignkit.data.shapes import preference_sides
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


@pytest.mark.real
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_real_pairs(real_data: Path, name: str) -> None:
    """Of 200 real pairs every token agrees; the split is ours in nearly nine of ten."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    path = real_data / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = compare(rows, tokenizer)
    assert found.pairs == found.same_tokens == 200
    assert found.prompt_is_shorter == 0
    assert 0.1 < found.prompt_swallows_answer / found.pairs < 0.3

    lost = 0
    for theirs in prepared_by_trl(rows, tokenizer, 256):
        prompt = len(theirs["prompt_ids"])
        left = [min(len(theirs[f"{side}_ids"]), 256 - prompt) for side in ("chosen", "rejected")]
        lost += any(
            kept < len(theirs[f"{side}_ids"])
            for kept, side in zip(left, ("chosen", "rejected"), strict=True)
        )
    dropped = 200 - len(prepared_by_trl(rows, tokenizer, 256))
    assert dropped + lost > 20, "trl at 256 drops pairs or cuts an answer's end, EOS included"
    ours = prepared_by_us(rows, tokenizer, 256)
    assert len(ours) >= 198
    assert all(r[-1] == tokenizer.eos_token_id for e in ours.values() for r in e.responses)
    print(f"\n{name}: {found}; at 256 trl drops {dropped} pairs and cuts {lost}")
