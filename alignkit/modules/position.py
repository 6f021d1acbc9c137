"""Let a run resume between two optimizer steps, wherever its checkpoint was written.

A checkpoint holds no gradients, so one written inside an accumulation window (by a validation, a
timer, a signal, an exception) would lose those of the micro-batches before it. Such a checkpoint
is rewound to the window's start: the loops, the data and the random state are those of the last
optimizer step, and a resumed run computes the whole window again. A run that stops within an epoch
is treated the same, as Lightning counts such an epoch as finished.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from alignkit.utils import random_state as rng

_KEY = "position"


@dataclass(frozen=True)
class WindowStart:
    """Hold the state before a window's first micro-batch, which a resumed run needs.

    Example:
        >>> WindowStart(batches=8, random_state={}).batches
        8

    Attributes:
        batches: Number of micro-batches of the epoch before the window.
        random_state: This rank's random state; see `alignkit.utils.random_state.random_state`.
    """

    batches: int
    random_state: dict[str, Tensor]


class Position:
    """Track the accumulation window that a run is in, and write it into its checkpoints."""

    def __init__(self) -> None:
        self._open: WindowStart | None = None
        # The number of micro-batches after which a validation of the open window has ended, and
        # the same for the window that a resumed run computes again.
        self._validated = 0
        self._validated_before = 0
        self._ready_before: int | None = None
        self._random_states: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None

    def before_batch(self, number: int, trainer: Trainer, device: torch.device) -> bool:
        """Record that a micro-batch begins.

        Args:
            number: The micro-batch's number in its epoch, from 0.
            trainer: The run's trainer.
            device: The device whose random state counts beside the CPU's.

        Returns:
            Whether it is the first of a window.
        """
        for epochs in vars(trainer.fit_loop.epoch_progress).values():
            if epochs.started == epochs.processed:
                # Lightning does not count the epoch that follows a resume from another one's end.
                epochs.ready, epochs.started = epochs.ready + 1, epochs.started + 1
        if number < self._validated_before:
            # Callbacks have seen the validation that follows; early stopping would count it twice.
            trainer.fit_loop.epoch_loop._skip_next_val = True
        # Lightning zeroes gradients by the same rule.
        first = self._open is None or number % trainer.accumulate_grad_batches == 0
        if first:
            self._open = WindowStart(number, rng.random_state(device))
            self._validated = self._validated_before
        return first

    def after_step(self) -> None:
        """Close the window, as the optimizer has stepped."""
        self._open = None
        self._validated_before = 0

    def after_validation(self, trainer: Trainer) -> None:
        """Record that a validation has ended."""
        if not trainer.sanity_checking:
            self._validated = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def save(
        self, checkpoint: MutableMapping[str, Any], trainer: Trainer, device: torch.device
    ) -> None:
        """Rewind a checkpoint to the last optimizer step; every rank must call it."""
        loop = trainer.fit_loop
        saved = checkpoint["loops"]["fit_loop"]
        now = loop.epoch_loop.batch_progress.current.ready
        start = self._open or WindowStart(now, rng.random_state(device))
        begun: int = loop.epoch_progress.current.started  # type: ignore[attr-defined]
        whole = self._open is None and loop.epoch_loop._num_ready_batches_reached()
        # A validation that an error interrupted begins again in the resumed run.
        outside = self._open is None and begun > 0
        cut = outside and trainer.validating and self._validated != now
        if begun and not whole:
            _rewind(saved, start.batches, step=trainer.global_step, validate=cut)
        elif begun:
            _end_epoch(saved, trainer.global_step)
        _restart_validation(saved["epoch_loop.val_loop.batch_progress"], begin=cut)
        checkpoint["rng"] = rng.of_all_ranks(start.random_state)
        checkpoint[_KEY] = {"validated": self._validated if self._open else 0}
        data = checkpoint.get(type(trainer.datamodule).__qualname__)  # type: ignore[attr-defined]
        if isinstance(data, dict) and {"epoch", "batches"} <= data.keys():
            # The end of an epoch is stored as the beginning of the next one.
            where = (begun, 0) if whole else (max(begun - 1, 0), start.batches)
            data.update(zip(("epoch", "batches"), where, strict=True))

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the position from a checkpoint; `start_run` restores the random state."""
        self._validated_before = checkpoint.get(_KEY, {}).get("validated", 0)
        loops = checkpoint.get("loops")
        self._ready_before = loops and _progress(loops["fit_loop"])["current"]["ready"]
        self._random_states = checkpoint.get("rng")

    def start_run(self, trainer: Trainer, device: torch.device) -> None:
        """Begin outside of any window, with the checkpoint's random state if there is one."""
        self._open = None
        if self._ready_before is not None:
            # Another number of micro-batches a step has moved the numbers of micro-batches.
            now = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._validated_before += (now - self._ready_before) * bool(self._validated_before)
            self._ready_before = None
        if self._random_states is not None:
            rng.restore_random_state(self._random_states, device, trainer.global_rank)
            self._random_states = None


def _rewind(fit_loop: dict[str, Any], batches: int, step: int, validate: bool) -> None:
    """Set the saved state of Lightning's loops to the current epoch, after some micro-batches.

    The state is that of a checkpoint written in ``on_train_batch_end``: the last micro-batch is
    done except for this hook. A resumed run then continues with the next micro-batch and counts the
    step once more. With ``validate`` the hook is done too, and the validation that is due follows.

    Args:
        fit_loop: The checkpoint's ``loops.fit_loop``; changed in place.
        batches: Number of micro-batches of the epoch that are done.
        step: The global step.
        validate: Whether the resumed run begins with a validation.
    """
    progress = _progress(fit_loop)
    back = progress["current"]["ready"] - batches
    for tracker in (progress["total"], progress["current"]):
        done = tracker["ready"] - back
        tracker.update(dict.fromkeys(tracker, done), completed=done if validate else done - 1)
    progress["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    for tracker in fit_loop["epoch_progress"].values():
        begun = tracker["started"]
        tracker.update(ready=begun, processed=begun - 1, completed=begun - 1)
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for tracker in steps.values():
        tracker["ready"] = tracker["completed"]  # a step that had begun was not taken


def _end_epoch(fit_loop: dict[str, Any], step: int) -> None:
    """Set the saved state within ``on_train_epoch_end`` to that after the epoch's last batch.

    Lightning goes on from there with the next epoch; from within the hook it would count the next
    one as done.
    """
    epoch, progress = fit_loop["epoch_progress"], _progress(fit_loop)
    if epoch["current"]["completed"] == epoch["current"]["processed"]:
        return
    for tracker in epoch.values():
        tracker.update(processed=tracker["ready"] - 1, completed=tracker["ready"] - 1)
    for tracker in (progress["total"], progress["current"]):
        tracker["completed"] = tracker["ready"] - 1
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


def _progress(fit_loop: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved progress through micro-batches."""
    progress: dict[str, Any] = fit_loop["epoch_loop.batch_progress"]
    return progress


def _restart_validation(progress: dict[str, Any], begin: bool) -> None:
    """Set the saved state of a validation to its beginning, or to none.

    A validation cannot continue in the middle, as its means begin with its first batch.
    """
    total, current = progress["total"], progress["current"]
    total.update(dict.fromkeys(total, total["completed"]))
    current.update(dict.fromkeys(current, 0))
    if begin:
        for tracker in (total, current):
            tracker["ready"] += 1
            tracker["started"] += 1
