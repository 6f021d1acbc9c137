"""Small files in the published shape."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["bread", "flour", "water", "salt", "oven", "heat", "cold", "wait", "knead", "rise"]


def sentence(rng: random.Random, low: int = 2, high: int = 12) -> str:
    """A few words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def pair(rng: random.Random, turns: int = 1) -> dict[str, str]:
    """One HH-RLHF pair whose prompt has ``turns`` questions."""
    prompt = ""
    for turn in range(turns):
        prompt += f"\n\nHuman: {sentence(rng)}?\n\nAssistant:"
        if turn < turns - 1:
            prompt += f" {sentence(rng)}."
    return {
        "chosen": f"{prompt} Yes, {sentence(rng)}.",
        "rejected": f"{prompt} No, {sentence(rng)}.",
    }


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hh_dir(tmp_path: Path) -> Path:
    """A directory with 40 training and 11 test pairs."""
    rng = random.Random(0)
    directory = tmp_path / "hh"
    directory.mkdir()
    for split, count in (("train", 40), ("test", 11)):
        rows = [pair(rng, rng.randint(1, 4)) for _ in range(count)]
        write_jsonl(directory / f"{split}.jsonl", rows)
    return directory


@pytest.fixture
def make(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """``make(DataModule, path, **options)`` with the small tokenizer and a cache of its own."""

    def build(cls: Callable[..., Any], path: Any, **options: Any) -> Any:
        options.setdefault("cache_dir", str(tmp_path / "cache"))
        return cls(str(tokenizer_dir), path, **options)

    return build
