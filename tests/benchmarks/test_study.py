"""The study: each arm's line, runs that are not done twice, and settings that may not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def study(run_on_pairs: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """``study(*flags)``: the exit code, at rates at which a tiny model learns."""
    return partial(
        run_on_pairs, "study.py", "--pairs=32", "--out", str(tmp_path / "out"), "--lr", "0.01",
        "--full-lr", "0.001",
    )  # fmt: skip


def test_every_kind_of_arm_learns_and_no_run_is_done_twice(
    study: Callable[..., int],
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arms = ["dpo", "sft", "sft-dpo", "dpo-nll", "rank-1", "full"]
    assert study("--arms", *arms, "--seeds", "1") == 0
    lines = (tmp_path / "out" / "study.jsonl").read_text().splitlines()
    found = {line["arm"]: line for line in map(json.loads, lines)}
    assert list(found) == arms
    for name, line in found.items():
        assert line["rewards/margins"] != 0 and line["kl"] > 0, f"{name} did not move"
    for name in ("dpo", "sft-dpo", "dpo-nll", "full"):
        assert found[name]["loss"] < 0.6931, f"{name} does not prefer the chosen answers"
    assert found["sft"]["displacement"] == 0, "SFT makes the chosen answers likelier"
    assert found["sft-dpo"]["kl"] != found["dpo"]["kl"]
    assert found["rank-1"]["trainable"] < found["dpo"]["trainable"] < found["full"]["trainable"]
    assert (tmp_path / "out" / "study.png").stat().st_size > 1000
    capsys.readouterr()

    assert study("--arms", "dpo", "--seeds", "2") == 0
    assert "dpo 1:" in (told := capsys.readouterr().out) and "dpo 0:" not in told
    again = (tmp_path / "out" / "study.jsonl").read_text().splitlines()
    assert again[: len(lines)] == lines and len(again) == len(lines) + 1
    written = tmp_path / "out" / "study.jsonl"
    written.write_text(written.read_text() + '{"arm": "sft", "se')  # as a killed run leaves it
    capsys.readouterr()
    assert study("--arms", "dpo", "--seeds", "2") == 0
    assert "dpo 1:" not in capsys.readouterr().out
    assert written.read_text().splitlines() == again
    assert study("--arms", "dpo", "--model", str(model_dir("gpt2"))) == 2
    assert "another model or other data" in capsys.readouterr().err
    assert study("--arms", "dpo", "--beta", "0.2") == 2
    assert "was run with other settings" in capsys.readouterr().err
    assert study("--seeds", "0") == 2


def test_mistakes_are_one_line_and_change_no_file(
    study: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "out" / "study.jsonl"
    for held in ("notes\nmore", '{"a": 1}\nmore', "3\nmore"):
        lines.parent.mkdir(exist_ok=True)
        lines.write_text(held)
        assert study("--arms", "dpo") == 2
        assert "study.jsonl:1: is no line of this study" in capsys.readouterr().err
        assert lines.read_text() == held
    for flags, part in (
        (["--out", str(lines)], "cannot be made a folder: File exists"),
        (["--out", str(lines / "below")], "cannot be made a folder: Not a directory"),
        (["--precision", "foo"], "--precision foo: choose 32-true, "),
    ):
        assert study(*flags) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and part in line and "\n" not in line
