"""Divided tensors of a checkpoint: written by a group of one rank, read whole, verified, safe."""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import metadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from alignkit.errors import AlignkitError
from alignkit.models import shards
from alignkit.models.archive import read_archive, write_archive
from alignkit.models.find import find_checkpoint, load_checkpoint

W, M = torch.arange(15.0).view(5, 3), torch.arange(7.0) / 7


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def saved(path: Path, mesh: DeviceMesh, w: torch.Tensor = W) -> dict[str, Any]:
    def divide(value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Shard(0)])

    content = {
        "state_dict": {"model.a": divide(w), "model.whole": torch.ones(2)},
        "optimizer_states": [
            {
                "state": {0: {"exp_avg": divide(M), "step": torch.tensor(3.0)}},
                "param_groups": [{"params": [0], "betas": (0.9, 0.95)}],
            }
        ],
        "global_step": 4,
    }
    written = shards.write_shards(content, path)
    write_archive(path, written)
    shards.forget_shards(path, but=written)
    return written


def test_a_checkpoint_is_read_whole_as_if_it_were_one_file(
    tmp_path: Path, mesh: DeviceMesh
) -> None:
    path = tmp_path / "last.ckpt"
    saved(path, mesh)
    assert path.stat().st_size < 5_000
    content = load_checkpoint(path)
    assert content.keys() == {"state_dict", "optimizer_states", "global_step"}
    assert torch.equal(content["state_dict"]["model.a"], W)
    assert torch.equal(content["state_dict"]["model.whole"], torch.ones(2))
    (optimizer,) = content["optimizer_states"]
    assert torch.equal(optimizer["state"][0]["exp_avg"], M)
    assert optimizer["state"][0]["step"] == 3
    assert optimizer["param_groups"] == [{"params": [0], "betas": (0.9, 0.95)}]


def test_shards_of_an_earlier_content_are_removed_with_it(tmp_path: Path, mesh: DeviceMesh) -> None:
    path = tmp_path / "last.ckpt"
    before = saved(path, mesh)
    after = saved(path, mesh, W + 1)
    (folder,) = shards.home(path).iterdir()
    assert folder.name == after[shards.KEY]["folder"] != before[shards.KEY]["folder"]
    assert torch.equal(load_checkpoint(path)["state_dict"]["model.a"], W + 1)
    shards.forget_shards(path)
    assert not shards.home(path).exists()


def flipped(folder: Path, path: Path) -> None:
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def removed(folder: Path, path: Path) -> None:
    (file,) = folder.glob("*.distcp")
    file.unlink()


def moved_away(folder: Path, path: Path) -> None:
    folder.parent.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (flipped, r"last\.ckpt: damaged: .*distcp does not match its checksum"),
        (removed, r"where __0_0\.distcp is missing; keep the folder beside the checkpoint"),
        (moved_away, r"last\.ckpt\.shards, where .* is missing; keep the folder"),
    ],
)
def test_damaged_or_missing_shards_are_refused_and_passed_over(
    harm: Callable[[Path, Path], None], line: str, tmp_path: Path, mesh: DeviceMesh
) -> None:
    path = tmp_path / "last.ckpt"
    content = saved(path, mesh)
    harm(shards.home(path) / content[shards.KEY]["folder"], path)
    with pytest.raises(AlignkitError, match=line):
        load_checkpoint(path)
    if harm is not moved_away:
        write_archive(tmp_path / "step=3.ckpt", {"global_step": 3})
        assert find_checkpoint(tmp_path) == str(tmp_path / "step=3.ckpt")


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MALICE"],)


def test_a_record_builds_nothing_but_its_own_classes(
    tmp_path: Path, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where whoever made it has put the right checksum into the archive."""
    monkeypatch.setenv("MALICE", str(tmp_path / "made"))
    path = tmp_path / "last.ckpt"
    content = saved(path, mesh)
    record = shards.home(path) / content[shards.KEY]["folder"] / ".metadata"
    record.write_bytes(pickle.dumps(Malice()))
    digest = xxhash.xxh3_128(record.read_bytes()).hexdigest()
    content[shards.KEY]["files"][".metadata"] = digest
    write_archive(path, content)
    with pytest.raises(AlignkitError, match=r"posix\.mkdir is not part of a record"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


class Attribute:
    """Is pickled as an attribute of something, as Python 3.11.2 pickles members of enumerations."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Callable, tuple[Any, str]]:
        return getattr, (self.of, self.name)


def test_a_record_may_hold_members_and_no_other_attributes() -> None:
    def read(value: Any) -> Any:
        return shards._RecordUnpickler(io.BytesIO(pickle.dumps(value))).load()

    kept = metadata._MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    assert read(Attribute(metadata._MEM_FORMAT_ENCODING, kept.name)) is kept
    for of, name in ((metadata.Metadata, "__init__"), (torch.Size, "mro"), ("text", "format")):
        with pytest.raises(pickle.UnpicklingError, match=f"{name} is not part of a record"):
            read(Attribute(of, name))


def test_a_folder_outside_is_refused(tmp_path: Path, mesh: DeviceMesh) -> None:
    path = tmp_path / "last.ckpt"
    content = saved(path, mesh)
    content[shards.KEY]["folder"] = "../elsewhere"
    write_archive(path, content)
    with pytest.raises(AlignkitError, match="names no folder of shards"):
        load_checkpoint(path)


def test_values_that_are_no_numbers_are_refused_by_name(tmp_path: Path, mesh: DeviceMesh) -> None:
    path = tmp_path / "last.ckpt"
    saved(path, mesh, W / 0)
    with pytest.raises(AlignkitError, match=r"state_dict\.model\.a holds NaN or infinity"):
        load_checkpoint(path)
    assert read_archive(path)["state_dict"]["model.a"].is_meta
