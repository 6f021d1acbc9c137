"""Configurations of the package, wherever it is installed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from alignkit.cli import main


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_are_listed_with_what_they_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    said = capsys.readouterr().out
    for name in ("lora_owt_gpt2", "sft_hh_pythia", "dpo_hh_pythia", "demo/dpo"):
        assert name in said
    assert "alignkit configs NAME" in said


def test_one_is_copied_and_none_is_written_over(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["configs", "sft_hh_pythia"]) == 0
    copied = empty / "sft_hh_pythia.yaml"
    assert yaml.safe_load(copied.read_text())["model"]["class_path"] == "alignkit.SFTModule"
    assert "alignkit fit --config sft_hh_pythia.yaml" in capsys.readouterr().out
    assert main(["configs", "sft_hh_pythia"]) == 2
    assert "--output sft_hh_pythia.yaml: exists; choose another" in capsys.readouterr().err
    assert main(["configs", "demo/dpo", "--output", "mine.yaml"]) == 0
    assert (empty / "mine.yaml").is_file()


def test_an_unknown_name_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["configs", "sft_hh_pythai"]) == 2
    assert "did you mean sft_hh_pythia?" in capsys.readouterr().err


def test_the_next_command_runs_as_printed(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(empty / "a [b]"))
    assert main(["configs", "demo/dpo", "--output", "~/my run.yaml"]) == 0
    place = empty / "a [b]" / "my run.yaml"
    assert place.is_file()
    (line,) = capsys.readouterr().out.splitlines()  # not folded, nothing taken for markup
    assert shlex.split(line.partition("run it with: ")[2])[-1] == str(place)
    assert main(["configs", "demo/dpo", "--output", ""]) == 2
