"""docs/iterate.md: its commands, run in their order on a tiny model, end with a trained policy."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "iterate.md").read_text(encoding="utf-8")
USAGE, RECORDED = PAGE.split("## A round that was run")
QUICK = ["--trainer.accelerator", "cpu"]
SHORT = {"sample": ["--max_new_tokens", "6", "--min_new_tokens", "3", "--device", "cpu"]}


def commands(page: str) -> list[list[str]]:
    """Return the arguments of each command that a page prints."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
    lines = (line for line in blocks.splitlines() if line.startswith("alignkit "))
    return [shlex.split(line)[1:] for line in lines]


def run(words: list[str], base: str, data: str = "") -> None:
    """Run a command of the page on a tiny base, in few tokens."""
    known = {"HuggingFaceTB/SmolLM2-135M-Instruct": base, "DIR": base}
    named = [known.get(word, word).replace("$D", data) for word in words]
    extra = [] if words[0] == "judge" else SHORT.get(words[0], QUICK)
    assert main([*named, *extra]) == 0, words


@pytest.fixture
def base(model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder with pairs, prompts and a model of them after SFT; returns its base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}, yes.", "rejected": "No."} for n in range(12)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = [{"prompt": row["prompt"]} for row in rows[:4]]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
    directory = tmp_path / "base"
    shutil.copytree(model_dir("llama"), directory)
    config = directory / "config.json"  # Real prompts have more of this tokenizer's tokens.
    longer = {**json.loads(config.read_text()), "max_position_embeddings": 4096}
    config.write_text(json.dumps(longer))
    assert main(["sft", "--base", "base", "--data", "pairs.jsonl", "--steps", "1", *QUICK]) == 0
    return "base"


def test_a_round_as_it_is_printed(base: str) -> None:
    assert [words[0] for words in commands(USAGE)] == ["fit", "sample", "judge", "dpo"]
    for words in commands(USAGE):
        run(words, base)
    assert Path("runs/round1/version_0/last.ckpt").is_file()


@pytest.mark.real
def test_the_round_that_was_run(base: str, real_data: Path) -> None:
    run(commands(USAGE)[0], base)
    assert [words[0] for words in commands(RECORDED)] == ["sample", "judge", "dpo"]
    for words in commands(RECORDED):
        run(words, base, str(real_data / "data" / "hh-rlhf" / "harmless-base"))
    assert len(Path("drawn.jsonl").read_text().splitlines()) == 24
    assert Path("runs/round1/version_0/last.ckpt").is_file()
