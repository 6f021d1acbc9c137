"""Restrict Lightning's weight averages (SWA, EMA) to the parameters that train.

Lightning's callbacks average every parameter and buffer of a deep copy. The average of a frozen
parameter differs from it by rounding, as ``decay · w + (1 - decay) · w`` drifts. The drifted base
would be validated, written over the real one, and held in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

AVERAGED = "averaged"
"""Attribute of a module and key of a checkpoint whose weights were replaced by an average."""

_Average = Callable[[Tensor, Tensor, Any], Tensor]
_AverageAll = Callable[[list[Tensor], list[Tensor], Any], None]


def average_trained_only(callback: Callback, module: LightningModule) -> None:
    """Restrict an averaging callback to the parameters that train; ignore any other callback.

    Args:
        callback: A callback whose ``setup`` has run, so that it has made its copy of the module.
        module: The module that trains, on the device on which it was copied.
    """
    if isinstance(callback, WeightAveraging):
        average = callback._average_model
        if average is not None:
            _share_frozen(average.module, module)
            _skip_shared(average)
    elif isinstance(callback, StochasticWeightAveraging):
        copied = callback._average_model
        if copied is not None:
            # Share only the storage: the callback may move its copy to another device.
            for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
                if not theirs.requires_grad:
                    mine.data = theirs.data
        kind = type(callback)
        callback.update_parameters = partial(_update_trained, kind)  # type: ignore[method-assign]
        callback.transfer_weights = partial(_transfer_trained, kind)  # type: ignore[method-assign]


def resume_average(callback: Callback, trainer: Trainer, module: LightningModule) -> None:
    """Start SWA in a resumed run, at the learning rates that were restored.

    SWA's schedule sets learning rates of its own when it is made, before it is restored.
    """
    if isinstance(callback, StochasticWeightAveraging):
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        callback.on_train_epoch_start(trainer, module)
        if callback._scheduler_state is not None:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def move_average_to_device(callback: Callback, module: LightningModule) -> None:
    """Move an average to the module's device, unless the callback was given a device.

    The callback makes its copy before the module is moved, and would average on the CPU.
    """
    if isinstance(callback, WeightAveraging) and callback._device is None:
        average = callback._average_model
        if average is not None:
            average.to(module.device)


def _share_frozen(copied: nn.Module, original: nn.Module) -> None:
    """Register the frozen parameters of a module in its copy, so that both hold one tensor."""
    for path, owner in original.named_modules():
        twin = copied.get_submodule(path)
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                twin.register_parameter(name, parameter)


def _skip_shared(average: AveragedModel) -> None:
    average.use_buffers = False  # buffers are copied then, not averaged
    if average.avg_fn is not None:
        average.avg_fn = partial(_average_unshared, average.avg_fn)
    if average.multi_avg_fn is not None:
        average.multi_avg_fn = partial(_average_all_unshared, average.multi_avg_fn)


def _average_unshared(average: _Average, mine: Tensor, theirs: Tensor, count: Any) -> Tensor:
    return mine if _share_storage(mine, theirs) else average(mine, theirs, count)


def _average_all_unshared(
    average: _AverageAll, mine: list[Tensor], theirs: list[Tensor], count: Any
) -> None:
    pairs = [pair for pair in zip(mine, theirs, strict=True) if not _share_storage(*pair)]
    if pairs:
        average([pair[0] for pair in pairs], [pair[1] for pair in pairs], count)


def _share_storage(mine: Tensor, theirs: Tensor) -> bool:
    return mine.data_ptr() == theirs.data_ptr() and mine.device == theirs.device


class _TrainedParameters:
    """Stand for a module, with only the parameters that train."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self._module.parameters() if p.requires_grad)


def _update_trained(
    kind: type[Any], average: nn.Module, module: nn.Module, count: Tensor, avg_fn: _Average
) -> None:
    kind.update_parameters(_TrainedParameters(average), _TrainedParameters(module), count, avg_fn)


def _transfer_trained(kind: type[Any], average: nn.Module, module: nn.Module) -> None:
    kind.transfer_weights(_TrainedParameters(average), _TrainedParameters(module))
    module.__dict__[AVERAGED] = True
