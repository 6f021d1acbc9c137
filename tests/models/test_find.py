"""What a path to a checkpoint stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignkit.errors import AlignkitError
from alignkit.models.archive import write_archive
from alignkit.models.find import find_checkpoint, load_checkpoint


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs of SFT: the second is the newest, the third has saved nothing."""
    monkeypatch.chdir(tmp_path)
    for age, (place, step) in enumerate(
        [
            ("version_1/last.ckpt", 20),
            ("version_1/step=20.ckpt", 20),
            ("version_1/step=10.ckpt", 10),
            ("version_0/last.ckpt", 30),
        ]
    ):
        save(Path("runs/sft", place), step, age)
    Path("runs/sft/version_2").mkdir()
    return Path("runs/sft")


def save(path: Path, step: int, age: int) -> None:
    write_archive(path, {"global_step": step, "name": str(path)})
    os.utime(path, (1e9 - age, 1e9 - age))


def damage(path: Path) -> None:
    times = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-60])
    os.utime(path, (times, times))


def test_a_file_is_itself(runs: Path) -> None:
    assert find_checkpoint(runs / "version_0/last.ckpt") == "runs/sft/version_0/last.ckpt"
    assert find_checkpoint("s3://bucket/last.ckpt") == "s3://bucket/last.ckpt"
    assert find_checkpoint("gpt2") == "gpt2"


def test_a_folder_of_runs_is_the_newest_ones_last(runs: Path) -> None:
    assert find_checkpoint("runs/sft") == "runs/sft/version_1/last.ckpt"
    assert find_checkpoint("runs/sft/version_0") == "runs/sft/version_0/last.ckpt"


def test_a_file_that_lies_in_a_run_below_is_found_there(runs: Path) -> None:
    """As it was written before runs had folders of their own."""
    assert find_checkpoint("runs/sft/last.ckpt") == "runs/sft/version_1/last.ckpt"
    save(runs / "last.ckpt", 1, 10)
    assert find_checkpoint("runs/sft/last.ckpt") == "runs/sft/last.ckpt"
    assert find_checkpoint("runs/sft") == "runs/sft/version_1/last.ckpt"


@pytest.mark.parametrize(
    "place", ["last.ckpt", "checkpoints/last.ckpt", "name/last.ckpt", "id/checkpoints/last.ckpt"]
)
def test_places_of_other_loggers_and_of_lightning(runs: Path, place: str) -> None:
    save(Path("other", place), 1, 0)
    assert find_checkpoint("other") == f"other/{place}"


def test_damaged_ones_are_passed_over_and_named(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First the same run's furthest one, then the run before."""
    for expected in ("version_1/step=20.ckpt", "version_1/step=10.ckpt", "version_0/last.ckpt"):
        caplog.clear()
        damage(Path(find_checkpoint("runs/sft")))
        caplog.clear()
        assert find_checkpoint("runs/sft") == f"runs/sft/{expected}"
        said = f"runs/sft: taking runs/sft/{expected}, for runs/sft/version_1/last.ckpt: not a"
        assert said in caplog.text
    damage(runs / "version_0/last.ckpt")
    with pytest.raises(AlignkitError, match="runs/sft: holds no intact checkpoint: "):
        find_checkpoint("runs/sft")


def test_a_damaged_file_is_refused_with_the_name_of_an_intact_one(runs: Path) -> None:
    damage(runs / "version_1/last.ckpt")
    expected = r"version_1/last\.ckpt: .*; runs/sft/version_1/step=20\.ckpt is intact"
    with pytest.raises(AlignkitError, match=expected):
        load_checkpoint(runs / "version_1/last.ckpt")
    damage(runs / "version_0/last.ckpt")
    with pytest.raises(AlignkitError, match=r"version_0/last\.ckpt: .*; runs/sft/version_1/step"):
        load_checkpoint(runs / "version_0/last.ckpt")
    expected = r"version_1/lst\.ckpt: no such checkpoint.*; runs/sft/version_1/step=20\.ckpt is"
    with pytest.raises(AlignkitError, match=expected):
        load_checkpoint(runs / "version_1/lst.ckpt")


def test_folders_without_checkpoints(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="runs/sft/version_2: a folder without checkpoints"):
        load_checkpoint("runs/sft/version_2")
    adapter = tmp_path / "adapter"
    save(adapter / "last.ckpt", 1, 0)
    (adapter / "adapter_config.json").write_text("{}")
    assert find_checkpoint(adapter) == str(adapter)


def test_what_is_being_written_is_no_checkpoint(runs: Path) -> None:
    (runs / "version_1" / ".0123.partial").write_bytes(b"half")
    (runs / "version_1" / ".last.ckpt").write_bytes(b"half")
    assert find_checkpoint("runs/sft") == "runs/sft/version_1/last.ckpt"


def test_launched_ranks_take_what_the_first_found(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run saves between the two looks."""
    first = find_checkpoint("runs/sft")
    save(runs / "version_2/last.ckpt", 99, -10)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_checkpoint("runs/sft") == first
    # From then on a rank looks as the first one does.
    assert find_checkpoint("runs/sft") == "runs/sft/version_2/last.ckpt"
