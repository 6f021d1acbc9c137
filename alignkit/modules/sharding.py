"""Divide models among processes: FSDP2, through Lightning's `ModelParallelStrategy`.

Each decoder block is a unit of PyTorch's `fully_shard`, and so is an embedding that shares nothing
with the head. The model around them is the root, which holds the rest: last norm, head, a tied
embedding. The engine calls the backbone below the root and reads the head's weight without calling
the head; `alignkit.engine.whole` therefore lets the root gather its part for a whole scoring, and
once a scoring, however many chunks a rank's head takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from alignkit.engine import PackedBatch, blocks_of, call_as_one, needs_no_probe
from alignkit.errors import AlignkitError
from alignkit.modules.strategy import NAME, ShardedStrategy, refuse_strategy
from alignkit.utils.deferred import hold

_REFUSED_CALLBACKS = (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)


def set_up_sharding(module: LightningModule, trainer: Trainer) -> None:
    """Let a module's models be sharded when Lightning configures its model, if its trainer shards.

    Raises:
        AlignkitError: The strategy is not supported, or something that does not work with it.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    refuse_strategy(type(strategy), name)
    if not isinstance(strategy, ModelParallelStrategy):
        hold(*models_of(module))
        return
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() != 1:
        raise AlignkitError(
            f"trainer.strategy={name}: tensor_parallel_size={mesh['tensor_parallel'].size()} is "
            f"not supported; use {NAME}, or set it to 1 and data_parallel_size to the number of "
            "processes"
        )
    _refuse_with_sharding(module, trainer)
    if type(strategy) is ModelParallelStrategy:
        # Its own checkpoints are restored without the checks of ours, and read by no command.
        strategy.__class__ = ShardedStrategy
    # An attribute of the module alone: Lightning's averaging warns of a class that has the method.
    module.configure_model = partial(_shard, module, mesh["data_parallel"])  # type: ignore[method-assign]


def _refuse_with_sharding(module: Any, trainer: Trainer) -> None:
    """Refuse what needs whole parameters, or as many forward passes on every rank."""
    options = module.hparams
    reasons = {
        "model.compile": bool(options.get("compile")),
        "model.quantize": options.get("quantize") is not None,
        "model.reference_cache": options.get("reference_cache") is not None,
        "model.reference_every": options.get("reference_every") is not None,
        "trainer.precision=16-mixed": getattr(trainer.precision_plugin, "scaler", None) is not None,
        "trainer.precision=64-true": str(trainer.precision) == "64-true",
    }
    _refuse([name for name, given in reasons.items() if given])
    for model in models_of(module):
        if not blocks_of(model):
            raise AlignkitError(
                f"trainer.strategy={NAME}: {type(model).__name__} has no blocks to shard; use ddp"
            )


def refuse_callbacks_with_sharding(trainer: Trainer) -> None:
    """Refuse callbacks that need whole parameters, before they are set up with a sharded model.

    Raises:
        AlignkitError: There is one, and the trainer shards.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        _refuse([type(c).__name__ for c in callbacks if isinstance(c, _REFUSED_CALLBACKS)])


def _refuse(told: list[str]) -> None:
    if told:
        raise AlignkitError(
            f"trainer.strategy={NAME}: does not work with {', '.join(told)}; leave that out, or "
            "use ddp"
        )


def models_of(module: Any) -> list[Any]:
    """Return the policy, and the reference's model if there is one."""
    reference = getattr(module, "reference", None)
    return [module.model, *([reference.model] if reference is not None else [])]


def _check_checkpoints(trainer: Trainer) -> None:
    """Refuse checkpoints that could not be written, before a step is taken."""
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy) and strategy.writes_shards:
        for saver in trainer.checkpoint_callbacks if trainer.state.fn == "fit" else ():
            strategy.check_place(getattr(saver, "dirpath", None) or trainer.default_root_dir)


def _shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Divide the policy and its reference, which share frozen shards too."""
    models = models_of(module)
    if units(module):
        return
    _check_checkpoints(module.trainer)
    policy, *references = models
    owner = {id(p): (part, name) for part, name, p in _parameters(policy)}
    shared = [
        (part, name, owner[id(p)])
        for reference in references
        for part, name, p in _parameters(reference)
        if id(p) in owner
    ]
    for model in models:
        for block in blocks_of(model):
            hold(block)  # read whole, one after the other
            fully_shard(block, mesh=mesh)
        if (embedding := _own_embedding(model)) is not None:
            fully_shard(embedding, mesh=mesh)
        # Only the policy's root is needed again, by the backward pass.
        fully_shard(model, mesh=mesh, reshard_after_forward=model is not policy)
        call_as_one(model, register_fsdp_forward_method)
    for part, name, (theirs, their_name) in shared:
        # A unit takes over what its modules hold when it first runs.
        part.register_parameter(name, theirs._parameters[their_name])


def _own_embedding(model: Any) -> nn.Module | None:
    """Return a model's embedding, unless the head or another part shares its parameters."""
    embedding: nn.Module = model.get_input_embeddings()
    inside = {id(part) for part in embedding.modules()}
    own = {id(p) for p in embedding.parameters()}
    others = {id(p) for part, _, p in _parameters(model) if id(part) not in inside}
    return embedding if own and not own & others else None


def _parameters(model: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield part, name, parameter


def units(module: Any) -> list[FSDPModule]:
    """Return the sharded parts of a module's models, outer before inner; none if not sharded."""
    return [
        each
        for model in models_of(module)
        for each in model.modules()
        if isinstance(each, FSDPModule)
    ]


def refuse_probe(module: Any, batch: PackedBatch) -> None:
    """Refuse a batch that would be scored by another number of forward passes on each rank.

    Each pass gathers weights from all ranks, which would wait for one another forever.

    Raises:
        AlignkitError: The batch does not fit a packed row as far as is known.
    """
    if units(module) and not needs_no_probe(module.model, batch.longest):
        raise AlignkitError(
            f"trainer.strategy={NAME}: {type(module.model).__name__} is not scored in one packed "
            f"row for sequences of {batch.longest} tokens, and sharded weights need as many passes "
            "on every rank; use ddp, or lower data.max_length"
        )


def gather_weights(module: Any) -> None:
    """Hold whole weights from here on: in an evaluation ranks may differ by a batch."""
    for unit in units(module):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def release_weights(module: Any) -> None:
    """Hold shards alone again, after `gather_weights`."""
    for unit in units(module):
        unit.set_reshard_after_forward(unit is not module.model, recurse=False)
        unit.reshard()


# Gradients ------------------------------------------------------------------------------


def local_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Return this rank's part of every gradient there is, the very storage."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g._local_tensor if isinstance(g, DTensor) else g for g in gradients]


def average_whole_gradients(parameters: list[Tensor]) -> None:
    """Make the gradients of whole parameters their means over ranks, where others are sharded.

    FSDP2 averages those of the models; a subclass may train parameters beside them. Every rank must
    call it.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """Return the norm of all gradients, the same on every rank, which must call it."""
    sharded: list[Tensor] = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    squared = nn.utils.get_total_norm(local_gradients(sharded)) ** 2
    dist.all_reduce(squared)
    whole = local_gradients([p for p in parameters if not isinstance(p, DTensor)])
    return (squared + nn.utils.get_total_norm(whole).to(squared) ** 2).sqrt()
