"""Where a run resumes: always between two optimizer steps, wherever it was when it was saved.

A checkpoint holds no gradients, so one written inside an accumulation window (by a validation, a
timer, a signal, an exception) would lose those of the micro-batches before it. Such a checkpoint
is put back to the window's start: the loops, the data and the random stream are those of the last
optimizer step, and a resumed run goes through the whole window again. The same holds for a run
that stops within an epoch, which Lightning counts as finished when it stops.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from alignkit.models import checkpoint as ckpt

_KEY = "position"


@dataclass(frozen=True)
class WindowStart:
    """What a resumed run needs of the moment before a window's first micro-batch.

    Attributes:
        batches: Micro-batches of the epoch before it.
        random_state: Of this rank, see `alignkit.models.checkpoint.random_state`.
    """

    batches: int
    random_state: dict[str, Tensor]


class Position:
    """Follows a run from window to window, and writes where it stands into its checkpoints."""

    def __init__(self) -> None:
        self._open: WindowStart | None = None
        # Micro-batches of the epoch after which a validation of the open window has ended, and
        # the same of the window that a resumed run goes through again.
        self._validated = 0
        self._validated_before = 0
        self._random_states: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None

    def before_batch(self, number: int, trainer: Trainer, device: torch.device) -> bool:
        """Follow a micro-batch, the ``number``-th of its epoch from 0.

        Returns:
            Whether it is the first of a window.
        """
        if number < self._validated_before:
            # Callbacks have counted the validation that follows; early stopping would count it
            # twice.
            trainer.fit_loop.epoch_loop._skip_next_val = True
        # As Lightning decides when to zero gradients.
        first = self._open is None or number % trainer.accumulate_grad_batches == 0
        if first:
            self._open = WindowStart(number, ckpt.random_state(device))
            self._validated = self._validated_before
        return first

    def after_step(self) -> None:
        """Close the window: the optimizer has stepped."""
        self._open = None
        self._validated_before = 0

    def after_validation(self, trainer: Trainer) -> None:
        """Remember that a validation has ended."""
        if not trainer.sanity_checking:
            self._validated = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def save(
        self, checkpoint: MutableMapping[str, Any], trainer: Trainer, device: torch.device
    ) -> None:
        """Make a checkpoint one of the last optimizer step; a collective over all ranks."""
        loop = trainer.fit_loop
        saved = checkpoint["loops"]["fit_loop"]
        now = loop.epoch_loop.batch_progress.current.ready
        start = self._open or WindowStart(now, ckpt.random_state(device))
        begun: int = loop.epoch_progress.current.started  # type: ignore[attr-defined]
        whole = self._open is None and loop.epoch_loop._num_ready_batches_reached()
        # A validation that was cut off by an error begins again where it was due.
        outside = self._open is None and begun > 0
        cut = outside and trainer.validating and self._validated != now
        if begun and not whole:
            _rewind(saved, start.batches, step=trainer.global_step, validate=cut)
        _restart_validation(saved["epoch_loop.val_loop.batch_progress"], begin=cut)
        checkpoint["rng"] = ckpt.of_all_ranks(start.random_state)
        checkpoint[_KEY] = {"validated": self._validated if self._open else 0}
        data = checkpoint.get(type(trainer.datamodule).__qualname__)  # type: ignore[attr-defined]
        if isinstance(data, dict) and {"epoch", "batches"} <= data.keys():
            # A whole epoch is the next one's beginning.
            where = (begun, 0) if whole else (max(begun - 1, 0), start.batches)
            data.update(zip(("epoch", "batches"), where, strict=True))

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take a checkpoint's position over; the random stream follows with `start_run`."""
        self._validated_before = checkpoint.get(_KEY, {}).get("validated", 0)
        self._random_states = checkpoint.get("rng")

    def start_run(self, device: torch.device, rank: int) -> None:
        """Begin outside of any window, with the random stream of a checkpoint if there is one."""
        self._open = None
        if self._random_states is not None:
            ckpt.restore_random_state(self._random_states, device, rank)
            self._random_states = None


def _rewind(fit_loop: dict[str, Any], batches: int, step: int, validate: bool) -> None:
    """Put the saved loops of Lightning into the current epoch, after so many micro-batches.

    They end as in a checkpoint that ``on_train_batch_end`` writes: the last micro-batch is done
    but for this hook. From there a resumed run goes straight on to the next one, and counts the
    step once more; or, as after that hook, to the validation that is due.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
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
        tracker["ready"] = tracker["completed"]  # one that had begun was not taken


def _restart_validation(progress: dict[str, Any], begin: bool) -> None:
    """Let a validation begin anew or not at all: its means began with its first batch."""
    total, current = progress["total"], progress["current"]
    total.update(dict.fromkeys(total, total["completed"]))
    current.update(dict.fromkeys(current, 0))
    if begin:
        for tracker in (total, current):
            tracker["ready"] += 1
            tracker["started"] += 1
