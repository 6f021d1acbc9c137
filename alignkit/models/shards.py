"""Keep the divided tensors of a checkpoint in files beside it, which all ranks write at once.

The checkpoint is a sealed archive as always, in which each such tensor has a shape and no content.
The values are written by PyTorch's distributed checkpoints (`torch.distributed.checkpoint`) into
``NAME.ckpt.shards``, and the archive holds the checksum of each of their files. Any number of
processes reads them, each what it needs. Nothing but their own record is unpickled.
"""

from __future__ import annotations

import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from alignkit.errors import AlignkitError
from alignkit.models.archive import read_archive
from alignkit.utils.finite import nested_tensors

KEY = "shards"
"""Key of what a checkpoint says of its shards."""
_RECORD = ".metadata"  # the name that torch gives to the record of a distributed checkpoint
_NAME = re.compile(r"[0-9a-f]{16}")
_BLOCK_BYTES = 2**20
_RECORD_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


def home(path: Path) -> Path:
    """Return the folder of a checkpoint's shards, whether or not it has any."""
    real = path.resolve()
    return real.with_name(f"{real.name}.shards")


def write_shards(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write a checkpoint's divided tensors; every rank must call it.

    Args:
        checkpoint: Its content.
        path: Its file, which is not written here.

    Returns:
        The content without those tensors' values, and with where they are.

    Raises:
        AlignkitError: They cannot be written, on all ranks.
    """
    rank = dist.get_rank()
    named: list[str] = [secrets.token_hex(8)]
    dist.broadcast_object_list(named, src=0)
    folder = home(path) / named[0]
    large = {n: t for n, t in nested_tensors(checkpoint) if isinstance(t, DTensor)}
    try:
        save(large, storage_writer=FileSystemWriter(folder))
    except (Exception, CheckpointException) as error:  # of all ranks, as torch gathers them
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise AlignkitError(
            f"{path}: shards cannot be written ({_reason(error)}); make room, or write elsewhere"
        ) from error
    own = [*folder.glob(f"__{rank}_*"), *([folder / _RECORD] if rank == 0 else [])]
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, {file.name: _digest(file) for file in own})
    files = {name: digest for part in parts for name, digest in part.items()}
    return {**_emptied(checkpoint), KEY: {"folder": named[0], "files": files}}


def forget_shards(path: Path, but: Mapping[str, Any] | None = None) -> None:
    """Remove the shards of a checkpoint, but those of its present content."""
    kept = but[KEY]["folder"] if but is not None and KEY in but else None
    for folder in home(path).glob("*"):
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
    if kept is None and home(path).is_dir():
        home(path).rmdir()


def stored_tensors(place: str | Path, content: Mapping[str, Any]) -> StoredTensors | None:
    """Return what reads the shards of a checkpoint that was read; ``None`` where it has none.

    Raises:
        AlignkitError: A file of them is missing or damaged.
    """
    return StoredTensors(Path(place), content) if KEY in content else None


def verify_checkpoint(path: Path) -> None:
    """Read a whole checkpoint, and compare it and its shards with their checksums.

    Raises:
        AlignkitError: It is missing or damaged.
    """
    stored_tensors(path, read_archive(path, tensors=False))


class StoredTensors:
    """Read the tensors that a checkpoint keeps in shards, once their files are verified.

    Args:
        path: The checkpoint.
        content: What it holds; its tensors without content are those in shards.

    Raises:
        AlignkitError: A file of them is missing or damaged.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._content = content
        self._names = {id(t): name for name, t in nested_tensors(content) if t.is_meta}
        folder, self._files = content[KEY]["folder"], dict(content[KEY]["files"])
        if not _NAME.fullmatch(folder):
            raise AlignkitError(f"{path}: names no folder of shards; use another checkpoint")
        self._folder = home(path) / folder
        for name, digest in self._files.items():
            file = self._folder / name
            if file.parent != self._folder or not file.is_file():
                raise AlignkitError(
                    f"{path}: its tensors lie in {home(path)}, where {name} is missing; keep the "
                    "folder beside the checkpoint, under its name"
                )
            if _digest(file) != digest:
                raise AlignkitError(
                    f"{path}: damaged: {file} does not match its checksum; use another checkpoint"
                )

    def read(self, places: list[tuple[Tensor, Tensor]]) -> None:
        """Read into tensors the values that empty ones of the content stand for.

        Args:
            places: Pairs of an empty tensor and of one of its shape to fill, which may be divided
                among ranks in any way.
        """
        wanted = {self._names[id(empty)]: target.detach() for empty, target in places}
        try:
            reader = _Reader(self._folder, set(self._files))
            with warnings.catch_warnings():
                # Each process reads what it needs by itself, also where there are others.
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(wanted, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # torch raises many kinds
            raise AlignkitError(
                f"{self.path}: its shards cannot be read ({_reason(error)})"
            ) from error
        for name, target in wanted.items():
            local = target.to_local() if isinstance(target, DTensor) else target
            if not local.isfinite().all():
                raise AlignkitError(
                    f"{self.path}: {name} holds NaN or infinity; use an earlier checkpoint"
                )

    def whole(self) -> dict[str, Any]:
        """Return the content with all tensors whole, as one that was written into one file."""
        empty = [t for _, t in nested_tensors(self._content) if t.is_meta]
        filled = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in empty}
        self.read([(t, filled[id(t)]) for t in empty])
        content: dict[str, Any] = _mapped(self._content, lambda t: filled.get(id(t), t))
        del content[KEY]
        return content


class _Reader(FileSystemReader):
    """Read shards whose record names tensors and known files alone."""

    def __init__(self, folder: Path, files: set[str]) -> None:
        super().__init__(folder)
        with (folder / _RECORD).open("rb") as file:
            record = _RecordUnpickler(file).load()
        if not isinstance(record, Metadata) or not all(
            isinstance(each, TensorStorageMetadata) for each in record.state_dict_metadata.values()
        ):
            raise pickle.UnpicklingError("the record holds more than tensors")
        if {info.relative_path for info in record.storage_data.values()} - files:
            raise pickle.UnpicklingError("the record names files without a checksum")
        record.storage_meta = StorageMeta(load_id=self.load_id)
        self._record = record

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the record, of which the base class would unpickle anything."""
        return self._record


class _RecordUnpickler(pickle.Unpickler):
    """Build the classes of a distributed checkpoint's record, and refuse all others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by its name, if it is one of the record's."""
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # where the checkpoint lay, which nobody reads
        if (module, name) == ("builtins", "getattr"):
            return _member
        known = name in _RECORD_CLASSES.get(module, ())
        if not known and not (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a record")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    """Return a member of an enumeration, which early Pythons 3.11 pickle as an attribute."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"{kind}.{name} is not part of a record")
    return kind[name]


def _reason(error: BaseException) -> str:
    """Return what went wrong in one line; of several ranks, on the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _emptied(content: Mapping[str, Any]) -> dict[str, Any]:
    emptied: dict[str, Any] = _mapped(
        content,
        lambda t: (
            torch.empty(t.shape, dtype=t.dtype, device="meta") if isinstance(t, DTensor) else t
        ),
    )
    return emptied


def _mapped(value: Any, change: Any) -> Any:
    """Return nested mappings and lists with a function applied to their tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(inner, change) for inner in value)
    return value


def _digest(file: Path) -> str:
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()
