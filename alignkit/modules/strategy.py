"""Define the strategy that shards blocks, and refuse those that cannot train our modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from alignkit.errors import AlignkitError
from alignkit.models.archive import local_path
from alignkit.models.find import find_checkpoint, load_checkpoint
from alignkit.models.shards import StoredTensors, forget_shards, stored_tensors, write_shards
from alignkit.models.weights import deferred_blocks
from alignkit.modules.checkpoint_io import SealedCheckpointIO

NAME = "fsdp2"
USABLE = f"ddp, ddp_fork, ddp_notebook, {NAME} or auto"


class ShardedStrategy(ModelParallelStrategy):
    """Train a sharded model.

    Checkpoints of adapters are one file of whole tensors. Those of a model that trains as a whole
    have shards beside the file, which all ranks write, unless ``save_distributed_checkpoint`` is
    false. The data-parallel size is the number of processes unless it is given, and tensors are not
    sharded in any other way. A plain `ModelParallelStrategy` becomes this class when a module of
    ours is set up.
    """

    _stored: StoredTensors | None = None

    def setup_environment(self) -> None:
        """Connect the processes, all of them in one group that shards."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = 1
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Keep blocks in the base's files until they are sharded (``trainer.init_module()``)."""
        with deferred_blocks():
            yield

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Restore weights once blocks are sharded and before the optimizer is made."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning hand over the optimizer's state."""
        return True

    @property
    def writes_shards(self) -> bool:
        """Tell whether checkpoints are written by all ranks at once, see `models/shards.py`.

        They are where the whole model trains, unless ``save_distributed_checkpoint`` is false.
        What adapters train is small, and stays in one file.
        """
        adapters = getattr(self.lightning_module, "lora", None) is not None
        return self._save_distributed_checkpoint and not adapters

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state, whole unless it goes into shards; every rank must call it."""
        assert self.lightning_module is not None
        return self._to_save(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the module, each rank its part."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        saved = checkpoint["state_dict"]
        state = self._parts([(value, own.get(name)) for name, value in saved.items()])
        self.lightning_module.load_state_dict(dict(zip(saved, state, strict=True)), strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, as the module's; every rank must call it."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        values = {number: self._to_save(each) for number, each in state["state"].items()}
        return {**state, "state": values}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, each rank its part."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameter_of = dict(zip(numbers, own, strict=True))
            places = [(n, name) for n, values in saved["state"].items() for name in values]
            parts = self._parts([(saved["state"][n][name], parameter_of[n]) for n, name in places])
            state: dict[int, dict[str, Any]] = {number: {} for number in saved["state"]}
            for (number, name), part in zip(places, parts, strict=True):
                state[number][name] = part
            optimizer.load_state_dict({**saved, "state": state})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write one file, and beside it the shards of a model that trains as a whole."""
        filepath = self.broadcast(filepath)
        if not self.writes_shards:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = self.check_place(filepath, storage_options)
        content = write_shards(checkpoint, path)
        Strategy.save_checkpoint(self, content, path)
        if self.is_global_zero:
            forget_shards(path, but=content)

    def check_place(self, place: _PATH, storage_options: Any | None = None) -> Path:
        """Return a place for a checkpoint with shards, if it can hold them.

        Raises:
            AlignkitError: It is a URL, or a plugin writes the files.
        """
        path = local_path(place)
        if (
            path is None
            or storage_options
            or not isinstance(self.checkpoint_io, SealedCheckpointIO)
        ):
            raise AlignkitError(
                f"{place}: checkpoints of a model that is sharded and trained as a whole are "
                "written by all processes into a folder, without a plugin; give a local path, or "
                "--trainer.strategy.save_distributed_checkpoint false"
            )
        return path

    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint, and its shards."""
        super().remove_checkpoint(filepath)
        path = local_path(filepath)
        if self.is_global_zero and path is not None:
            forget_shards(path)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one file; tensors that lie in shards are read when they are restored."""
        self._stored = None
        if not isinstance(self.checkpoint_io, SealedCheckpointIO):
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        found = find_checkpoint(checkpoint_path)
        content = load_checkpoint(found, whole=False)
        self._stored = stored_tensors(found, content)
        return content

    # Inside ---------------------------------------------------------------------------------

    def _to_save(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values) if self.writes_shards else {n: _whole(v) for n, v in values.items()}

    def _parts(self, places: list[tuple[Any, Tensor | None]]) -> list[Any]:
        """Return this rank's parts of saved values, each beside the parameter that it is for."""
        parts: list[Any] = []
        in_shards: list[tuple[Tensor, Tensor]] = []
        for value, like in places:
            fits = isinstance(value, Tensor) and like is not None and value.shape == like.shape
            if fits and value.is_meta:
                assert like is not None
                parts.append(torch.empty_like(like, dtype=value.dtype, requires_grad=False))
                in_shards.append((value, parts[-1]))
            else:
                parts.append(_part(value, like) if fits else value)
        if in_shards:
            assert self._stored is not None
            self._stored.read(in_shards)
        return parts


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, ShardedStrategy, description=str(ShardedStrategy.__doc__))


def refuse_strategy(kind: type, name: str) -> None:
    """Refuse strategies whose processes do not hold what ours need.

    Args:
        kind: The strategy's class.
        name: As the user gave it.

    Raises:
        AlignkitError: The class is neither one of those that train correctly, nor derived from one.
    """
    theirs = next((each for each in kind.__mro__ if each.__module__.startswith("lightning.")), kind)
    if theirs in (DDPStrategy, SingleDeviceStrategy, ModelParallelStrategy):
        return
    raise AlignkitError(
        f"trainer.strategy={name}: {theirs.__name__} is not supported: it flattens or partitions "
        "parameters, so that adapters, reference and checkpoints do not find them; to shard a "
        f"model use {NAME} (FSDP2), else one of {USABLE}"
    )


def _whole(value: Any) -> Any:
    """Return a tensor whole and on the CPU where it is sharded."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _part(value: Any, like: Tensor | None) -> Any:
    """Return this rank's part of a whole tensor, where ``like`` of the same shape is sharded."""
    if not isinstance(like, DTensor):
        return value
    there = value.to(like.device)
    # Every rank has read the same file, so nothing need be sent.
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
