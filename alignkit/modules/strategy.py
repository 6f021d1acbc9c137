"""Define the strategy that shards blocks, and refuse those that cannot train our modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
from alignkit.models.weights import deferred_blocks

NAME = "fsdp2"
USABLE = f"ddp, ddp_fork, ddp_notebook, {NAME} or auto"


class ShardedStrategy(ModelParallelStrategy):
    """Train with sharded blocks, and write checkpoints of whole tensors into one file.

    The data-parallel size is the number of processes unless it is given, and tensors are not
    sharded in any other way. A plain `ModelParallelStrategy` becomes this class when a module of
    ours is set up.
    """

    def setup_environment(self) -> None:
        """Connect the processes, all of them in one group that shards."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = 1
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Leave blocks in the base's files until they are sharded (``trainer.init_module()``)."""
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

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state with whole tensors; every rank must call it."""
        assert self.lightning_module is not None
        return {name: _whole(value) for name, value in self.lightning_module.state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the module from whole tensors, of which each rank keeps its part."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        state = {n: _part(value, own.get(n)) for n, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state with whole tensors; every rank must call it."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        whole = {
            number: {name: _whole(value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers from whole tensors, of which each rank keeps its part."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameter_of = dict(zip(numbers, own, strict=True))
            state = {
                number: {name: _part(v, parameter_of[number]) for name, v in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write one file, as strategies that shard nothing do."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one file, as strategies that shard nothing do."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


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
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    there = value.to(like.device)
    # Every rank has read the same file, so nothing need be sent.
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
