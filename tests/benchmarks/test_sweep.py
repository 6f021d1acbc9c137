"""The sweep: trials that go on where a search stopped, and test pairs that are touched once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

pytest.importorskip("optuna", reason="the extra sweep is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def sweep(run_on_pairs: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """``sweep(what, *flags)``: the exit code, for two losses."""

    def run(what: str, *flags: str) -> int:
        fixed = [
            "--study",
            str(tmp_path / "study.log"),
            "--pairs",
            "16",
            "--losses",
            "DPO",
            "SimPO",
        ]
        return run_on_pairs("sweep.py", what, *fixed, *flags)

    return run


def test_a_search_goes_on_and_its_best_are_tested_once(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = str(tmp_path / "sweep.json")
    assert sweep("final", "--json", results) == 2
    assert "is not there; search first" in capsys.readouterr().err
    assert sweep("search", "--trials", "1") == 0
    first = capsys.readouterr().out
    assert first.count("complete") == 2
    assert sweep("search", "--trials", "2") == 0
    told = capsys.readouterr().out
    assert "DPO 1:" in told and "SimPO 1:" in told and "DPO 0:" not in told
    recipes = [line.partition("{")[2] for line in (first + told).splitlines() if "DPO" in line]
    assert len(set(recipes)) == 2, "the second search draws anew"
    assert sweep("search", "--trials", "2") == 0 and "DPO" not in capsys.readouterr().out
    assert sweep("search", "--trials", "3", "--pairs", "32") == 2
    assert "was begun with the budget" in capsys.readouterr().err
    for flags, part in (
        (("--rates", "1e-5", "1e-4"), "was begun with the --rates [1e-05, 0.002]"),
        (("--looks", "2"), "was begun with --looks 4"),
    ):
        assert sweep("search", "--trials", "3", *flags) == 2
        assert part in capsys.readouterr().err

    assert sweep("final", "--seeds", "2", "--json", results) == 0
    found = json.loads(Path(results).read_text())["losses"]
    assert set(found) == {"DPO", "SimPO"}
    for loss, each in found.items():
        assert each["recipe"]["loss"] == loss and len(each["runs"]) == 2
        values = [run["rewards/accuracies"] for run in each["runs"]]
        told_mean = each["test"]["rewards/accuracies"]
        assert told_mean["mean"] == pytest.approx(sum(values) / 2)
        assert told_mean["error"] == pytest.approx(abs(values[0] - values[1]) / 2)
        assert 0 <= told_mean["mean"] <= 1 and each["held_out"]["loss"] > 0
    again = str(tmp_path / "again.json")
    assert sweep("final", "--seeds", "1", "--json", again) == 0
    assert json.loads(Path(again).read_text())["losses"] == found, "nothing is measured again"
    capsys.readouterr()
    assert sweep("search", "--trials", "3") == 2
    assert "the test pairs of DPO have been measured" in capsys.readouterr().err


def test_a_stopped_final_goes_on_and_another_model_or_data_is_refused(
    sweep: Callable[..., int],
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped at the first loss's second seed: of its runs one is left to do."""
    assert sweep("search", "--trials", "1") == 0
    seeds: list[int] = []
    tests = Trainer.test

    def test(self: Trainer, *arguments: object, **options: object) -> object:
        seeds.append(int(os.environ["PL_GLOBAL_SEED"]))
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return tests(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "test", test)
    results = str(tmp_path / "sweep.json")
    with pytest.raises(KeyboardInterrupt):
        sweep("final", "--seeds", "2", "--json", results)
    assert sweep("final", "--seeds", "2", "--json", results) == 0
    assert seeds == [1, 2, 2, 1, 2]
    assert sweep("final", "--seeds", "3", "--losses", "DPO", "--json", results) == 0
    assert seeds[5:] == [3]
    capsys.readouterr()
    assert sweep("final", "--model", str(model_dir("gpt2")), "--json", results) == 2
    assert "was begun with another --model or --data" in capsys.readouterr().err
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows.replace("Say 3.", "Say three."))
    assert sweep("search", "--trials", "1") == 2
    assert "was begun with another --model or --data" in capsys.readouterr().err


def test_mistakes_are_one_line(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, part in (
        (["--model", str(tmp_path)], "holds no config.json"),
        (["--data", str(tmp_path / "nope")], "--data"),
        (["--study", str(tmp_path / "no" / "study.log")], "its folder is missing"),
        (["--seeds", "0"], "--seeds: must be 1 or more"),
        (["--looks", "0"], "--looks: must be 1 or more"),
        (["--rates", "1e-3", "1e-4"], "--rates 0.001 0.0001: give a least"),
        (["--precision", "foo"], "--precision foo: choose 32-true, "),
        (["--study", str(tmp_path)], "is a folder; name a file"),
    ):
        assert sweep("search", *flags) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and part in line and "\n" not in line
    assert not (tmp_path / "study.log").exists()


@pytest.mark.parametrize("held", ["notes\n", '{"budget": 3}\n', "3\n", "no end", "\x00\xff"])
def test_a_file_that_is_no_study_is_left_as_it_is(
    held: str, sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.write_bytes(held.encode("latin-1"))
    for what in ("search", "final"):
        assert sweep(what, "--study", str(other), "--json", str(tmp_path / "found.json")) == 2
        line = capsys.readouterr().err.strip()
        assert line == f"error: --study {other}: is no study of a search; name another file"
    assert other.read_bytes() == held.encode("latin-1")


def test_a_search_whose_trials_all_fail_says_so(
    sweep: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": 3}\n' * 4)
    assert sweep("search", "--trials", "2") == 2
    assert "DPO: no trial finished" in capsys.readouterr().err
