"""Adapt Lightning's callbacks to our modules, and refuse those that cannot work with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    ThroughputMonitor,
    WeightAveraging,
)

from alignkit.errors import AlignkitError
from alignkit.modules.averaging import (
    AVERAGED,
    average_trained_only,
    move_average_to_device,
    resume_average,
)
from alignkit.modules.sharding import refuse_callbacks_with_sharding
from alignkit.utils.plain import plain

_TUNERS = (LearningRateFinder, BatchSizeFinder)
_REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: (
        "the data deals each optimizer step its batches when training starts; set "
        "trainer.accumulate_grad_batches"
    ),
    BaseFinetuning: (
        "a checkpoint holds what trains from the start, so nothing may be frozen or unfrozen "
        "during a run; choose what trains with model.lora (layers, targets, modules_to_save)"
    ),
    ModelPruning: (
        "it replaces parameters, which neither adapters nor checkpoints survive; prune the base "
        "before training"
    ),
}
_NEED_A_LOGGER = (LearningRateMonitor, DeviceStatsMonitor, ThroughputMonitor)
# Types that `torch.load` reads without unpickling objects.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.Size)
_PLAIN_TORCH = (torch.dtype, torch.device)


def check_callbacks(trainer: Trainer, lora_plus: bool) -> None:
    """Refuse callbacks that cannot do their work in a fit of our modules.

    Args:
        trainer: A trainer about to fit, whose callbacks are not set up yet.
        lora_plus: Whether A and B of an adapter have different learning rates.

    Raises:
        AlignkitError: A callback cannot work; the message says what to do instead.
    """
    refuse_callbacks_with_sharding(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for kind, reason in _REFUSED.items():
            if isinstance(callback, kind):
                raise AlignkitError(f"{name}: not supported: {reason}")
        if isinstance(callback, _NEED_A_LOGGER) and not trainer.loggers:
            raise AlignkitError(f"{name}: has no logger to write to; set trainer.logger or drop it")
        if isinstance(callback, BatchSizeFinder) and callback._batch_arg_name == "batch_size":
            raise AlignkitError(
                f"{name}: a batch is as large as its tokens; give it batch_arg_name "
                "'tokens_per_batch'"
            )
        if isinstance(callback, LearningRateFinder) and lora_plus:
            raise AlignkitError(
                f"{name}: tries one rate for every parameter; set model.lora_plus_ratio to 1"
            )
        if trainer.num_devices * trainer.num_nodes > 1 and (
            isinstance(callback, OnExceptionCheckpoint)
            or getattr(callback, "save_on_exception", False)
        ):
            raise AlignkitError(
                f"{name}: a rank that fails would wait for the others to save; leave "
                f"{'save_on_exception' if isinstance(callback, ModelCheckpoint) else 'it'} out on "
                "several processes, and save every few steps"
            )
        if isinstance(callback, SpikeDetection):
            # Its `load_state_dict` reads the attribute `running`, which it never sets.
            callback.running = callback.running_mean  # type: ignore[attr-defined]
    if any(isinstance(c, WeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, ModelCheckpoint) and keeper.save_weights_only:
                raise AlignkitError(
                    f"{type(keeper).__name__}: save_weights_only would leave the averaged weights "
                    "out; set it to false"
                )


def searches_batch_size(trainer: Trainer) -> bool:
    """Tell whether a trainer first searches a batch size, which decides the number of steps."""
    return any(isinstance(c, BatchSizeFinder) for c in trainer.callbacks)  # type: ignore[attr-defined]


def set_up_callbacks(trainer: Trainer, module: LightningModule) -> None:
    """Adapt the callbacks, whose ``setup`` has run, and insert a `Companion` before them."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average_trained_only(callback, module)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "sized"):
        data.sized = not searches_batch_size(trainer)
    if not any(isinstance(callback, Companion) for callback in callbacks):
        callbacks.insert(0, Companion())


class Companion(Callback):
    """Prepare Lightning's other callbacks: the companion runs before each of their hooks."""

    def __init__(self) -> None:
        self._begun: int | None = None
        self._logged: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the logged metrics, for callbacks that read them after the file is written."""
        return {"logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics that were logged before the checkpoint was written."""
        self._logged = state_dict["logged"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a resumed run's callbacks the metrics that were logged before.

        Early stopping reads them at the end of an epoch, also in a run that was resumed between a
        validation and that end.
        """
        device = pl_module.device
        trainer.callback_metrics.update(
            {name: torch.tensor(value, device=device) for name, value in self._logged.items()}
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch that Lightning has begun."""
        self._begun = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start an epoch for SWA in a resumed run, where Lightning skips `on_train_epoch_start`.

        In a run resumed between two epochs, the second one's weights would not be added to the
        average. In one resumed within an epoch, SWA's schedule would not continue.
        """
        if self._begun != trainer.current_epoch:
            self._begun = trainer.current_epoch
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                resume_average(callback, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move averages to the module's device, and refuse to tune a resumed run.

        Raises:
            AlignkitError: A tuner would overwrite the resumed state with its own initial state.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            move_average_to_device(callback, pl_module)
            if isinstance(callback, _TUNERS) and getattr(pl_module, "resumes", False):
                raise AlignkitError(
                    f"{type(callback).__name__}: a resumed run keeps what it began with; drop it, "
                    "or start anew with model.init_from"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the logged metrics, and refuse a callback that monitors an unknown one.

        Raises:
            AlignkitError: The metric is unknown; the message lists those of this validation.
        """
        logged = trainer.callback_metrics
        if trainer.state.fn != "fit" or not logged:
            return
        if not trainer.sanity_checking:
            self._logged = {name: value.item() for name, value in logged.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith("val") and monitor not in logged:
                known = ", ".join(sorted(name for name in logged if name.startswith("val")))
                raise AlignkitError(
                    f"{type(callback).__name__}: monitor {monitor!r} is no metric of this "
                    f"validation; give one of {known}"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoints before an average replaces the trained weights.

        A run that resumes from them continues with its own weights.
        """
        if any(isinstance(c, WeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
            for keeper in trainer.checkpoint_callbacks:
                keeper.on_train_end(trainer, pl_module)
            pl_module.__dict__[AVERAGED] = True


def refuse_averaged(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint whose weights were replaced by an average.

    Raises:
        AlignkitError: They were; the optimizer's state belongs to the weights before.
    """
    if checkpoint.get(AVERAGED):
        raise AlignkitError(
            "ckpt_path: holds the average that a run ended with, which its optimizer never saw; "
            "pass it as model.init_from, or resume from a checkpoint before the end"
        )


def make_states_plain(states: dict[str, Any]) -> None:
    """Convert callbacks' states to values that load without unpickling, such as paths to strings.

    Args:
        states: A checkpoint's ``callbacks``; changed in place.

    Raises:
        AlignkitError: A callback keeps an object that loads only by unpickling.
    """
    for name, state in states.items():
        states[name] = _plain(state, name)


def _plain(value: Any, callback: str) -> Any:
    if type(value) in (dict, OrderedDict):
        items: Mapping[Any, Any] = value
        return type(value)((_plain(k, callback), _plain(v, callback)) for k, v in items.items())
    if type(value) in (list, tuple, set):
        return type(value)(_plain(each, callback) for each in value)
    if isinstance(value, _PLAIN_TORCH) or type(value) in (*_PLAIN, torch.nn.Parameter):
        return value
    if type(made := plain(value)) in _PLAIN:
        return made
    raise AlignkitError(
        f"{callback}: keeps a {type(value).__name__} in its state, which a checkpoint that loads "
        "without unpickling cannot hold; drop the callback"
    )
