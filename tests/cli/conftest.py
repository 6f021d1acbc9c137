"""A user's files: a tiny model, a few pairs, a few texts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from alignkit.cli import main
from tests.cli.test_fit import quick

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
WORDS = ["bread", "tea", "salt", "rain", "wood", "iron", "glass", "paper", "cloth", "sand"]


def pair(i: int) -> dict[str, str]:
    """One HH-RLHF row: two turns before the answer in every third."""
    word, other = WORDS[i % 10], WORDS[(i * 7 + 3) % 10]
    history = f"\n\nHuman: Hello {i}\n\nAssistant: Hi, what is it?" if i % 3 == 0 else ""
    prompt = f"{history}\n\nHuman: Tell me about {word} and {other} {i}.\n\nAssistant:"
    return {
        "chosen": f"{prompt} {word.title()} is made with care, {other} less so.",
        "rejected": f"{prompt} I do not know.",
    }


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def hh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hh")
    write_lines(directory / "train.jsonl", [pair(i) for i in range(40)])
    write_lines(directory / "test.jsonl", [pair(i) for i in range(40, 50)])
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    rows = [{"text": f"The {w} of {o} is old. " * 6} for w in WORDS for o in WORDS[:4]]
    write_lines(directory / "train.jsonl", rows)
    write_lines(directory / "test.jsonl", rows[::9])
    return directory


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An empty folder to stand in, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return tmp_path


@pytest.fixture
def alignkit(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: ``(status, stdout, stderr)``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argument parsing
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def command(
    workplace: Path, model_dir: Callable, hh: Path, text: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one step of SFT as a process of its own."""

    def run(
        start: list[str],
        *changes: object,
        environment: Mapping[str, str] | None = None,
        shell: str = "",
    ) -> subprocess.CompletedProcess[str]:
        arguments = [*start, *quick("demo/sft.yaml", model_dir, hh, text, 1), *changes]
        known = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
        known |= {"OMP_NUM_THREADS": "1", **(environment or {})}
        if shell:
            arguments = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *arguments]
        return subprocess.run(
            [str(a) for a in arguments], capture_output=True, text=True, timeout=300, env=known
        )

    return run
