"""docs/iterate.md: its commands, run in their order on a tiny model, end with a trained policy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "iterate.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for line in "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S))
    .replace("\\\n", " ")
    .splitlines()
    if line.startswith("alignkit ")
]
SHORT = {
    "sample": ["--max_new_tokens", "6", "--min_new_tokens", "3", "--device", "cpu"],
    "judge": [],
}


def test_a_round_as_it_is_printed(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}, yes.", "rejected": "No."} for n in range(12)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = [{"prompt": row["prompt"]} for row in rows[:4]]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
    base = str(model_dir("llama"))
    quick = ["--trainer.accelerator", "cpu"]
    assert main(["sft", "--base", base, "--data", "pairs.jsonl", "--steps", "1", *quick]) == 0
    assert [words[0] for words in COMMANDS] == ["fit", "sample", "judge", "dpo"]
    for words in COMMANDS:
        named = [base if word.startswith("HuggingFaceTB/") else word for word in words]
        assert main([*named, *SHORT.get(words[0], quick)]) == 0, words
    assert Path("runs/round1/version_0/last.ckpt").is_file()
