"""Every run has a folder of its own, whenever it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from alignkit.modules.runs import claim_run_folder, run_folder
from tests.modules.helpers import trainer


@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger, None])
def test_two_runs_that_start_together_take_two_folders(logger: type | None, tmp_path: Path) -> None:
    """All three look for a free number before any of them has made its folder."""
    folders = []
    for _ in range(3):
        own = logger(tmp_path, name="sft") if logger else False
        if own:
            looks = [0, own._get_next_version]
            own._get_next_version = lambda looks=looks: looks.pop(0) if looks[:-1] else looks[0]()
        run = trainer(tmp_path, logger=own)
        claim_run_folder(run)
        claim_run_folder(run)  # of a second fit
        folders.append(Path(run_folder(run)))
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    assert all(folder.is_dir() for folder in folders)
    assert {f.parent.name for f in folders} == {"sft" if logger else "checkpoints"}


def test_a_number_that_the_user_gives_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="sft", version=0))
    (tmp_path / "sft" / "version_0").mkdir(parents=True)
    claim_run_folder(run)
    assert run_folder(run) == str(tmp_path / "sft" / "version_0")


def test_a_file_in_the_folders_place_does_not_hang(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="sft"))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "version_0").touch()
    claim_run_folder(run)


def test_other_ranks_claim_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned or forked one, and the first process of a machine whose number alone is known."""
    logger = TensorBoardLogger(tmp_path)
    spawned = trainer(tmp_path, devices=2, strategy="ddp_spawn", logger=logger)
    monkeypatch.setenv("LOCAL_RANK", "1")  # all that its launcher sets in the process it starts
    claim_run_folder(spawned)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("NODE_RANK", "1")
    machine = trainer(tmp_path, num_nodes=2, strategy="ddp", logger=logger)
    claim_run_folder(machine)
    assert not list(tmp_path.rglob("version_*"))
