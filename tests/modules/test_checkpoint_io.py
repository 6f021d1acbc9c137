"""Any trainer that meets our modules writes checkpoints whole, and reads none that is damaged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from alignkit.callbacks import Checkpoint
from alignkit.errors import AlignkitError
from alignkit.models.archive import verify_archive
from alignkit.modules import SFTModule
from alignkit.modules.checkpoint_io import SealedCheckpointIO
from tests.modules.helpers import answers, loader, trainer


@pytest.fixture
def sft(model_dir: Callable[[str], Path]) -> SFTModule:
    return SFTModule(str(model_dir("gpt2")))


def is_sealed(path: Path) -> bool:
    verify_archive(path)
    return b"alignkit xxh3 " in path.read_bytes()[-60:]


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()], [TorchCheckpointIO()]])
def test_lightnings_own_callback_writes_beside_the_target(
    sft: SFTModule, tmp_path: Path, plugins: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes through the temporary folder, which may be another file system."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    saver = ModelCheckpoint(tmp_path / "run", save_last=True)
    run = trainer(
        tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True, plugins=plugins
    )
    run.fit(sft, loader(answers(4), 2))
    assert is_sealed(tmp_path / "run" / "last.ckpt")
    run.save_checkpoint(tmp_path / "mine.ckpt")
    run.strategy.checkpoint_io.teardown()
    assert is_sealed(tmp_path / "mine.ckpt")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial"]


def test_a_plugin_of_the_users_own_is_left_alone(sft: SFTModule, tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for own in (Own(), AsyncCheckpointIO(Own())):
        run = trainer(tmp_path, max_steps=1, plugins=[own])
        run.fit(sft, loader(answers(2), 2))
        io: CheckpointIO | None = run.strategy.checkpoint_io
        assert io is own
        assert isinstance(getattr(io, "checkpoint_io", io), Own)


def test_python_resumes_from_a_folder_and_refuses_what_is_damaged(
    sft: SFTModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def fit(ckpt_path: str | None, steps: int = 1) -> None:
        saver = Checkpoint(save_last=True, save_top_k=0)
        run = trainer(".", max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        run.fit(sft, loader(answers(4), 2), ckpt_path=ckpt_path)

    with pytest.raises(AlignkitError, match="ckpt_path last: there is no checkpoint in"):
        fit("last")
    fit(None)
    fit("checkpoints", 2)
    fit("last", 3)
    newest = Path("checkpoints/version_2/last.ckpt")
    assert torch.load(newest, weights_only=True)["global_step"] == 3
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    data[len(data) // 3] ^= 1
    newest.write_bytes(data)
    expected = r"version_2/last\.ckpt: damaged: .*; checkpoints/version_1/last\.ckpt is intact"
    for use in (fit, SFTModule.load_from_checkpoint):
        with pytest.raises(AlignkitError, match=expected):
            use(str(newest))
    assert isinstance(SFTModule.load_from_checkpoint("checkpoints/version_1"), SFTModule)


def test_a_url_is_left_to_lightning(sft: SFTModule, tmp_path: Path) -> None:
    saver = ModelCheckpoint("memory://there", save_last=True)
    run = trainer(tmp_path, max_steps=1, callbacks=[saver], enable_checkpointing=True)
    run.fit(sft, loader(answers(2), 2))
    assert isinstance(run.strategy.checkpoint_io, SealedCheckpointIO)
    again = trainer(tmp_path, max_steps=2)
    again.fit(sft, loader(answers(4), 2), ckpt_path="memory://there/last.ckpt")
    assert again.global_step == 2
    assert not list(tmp_path.rglob("*.ckpt")) and not os.path.exists("memory:")
