"""Handle signals during training: finish the optimizer step, save and exit.

After SIGTERM Lightning raises a `SystemExit` of status 0, in the middle of an accumulation window
and with nothing saved. It treats Ctrl-C as a failure.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from alignkit.modules.requeue import (
    STATE,
    kept_if_whole,
    requeue_job,
    reserve_checkpoint,
    this_run,
)
from alignkit.utils.interrupts import Stopped, stop_at_once, write_line
from alignkit.utils.ranks import is_lost_connection

log = logging.getLogger(__name__)

_FIRST = 1024  # above the number of any signal


class Signals(Callback):
    """Save and end a run on SIGTERM, Ctrl-C or SLURM's requeue signal.

    Whichever rank got the signal, all ranks finish the step that is being computed. Then
    ``last.ckpt`` is written and its path logged, and `Stopped` is raised: exit status 143 after
    SIGTERM and 130 after Ctrl-C. After SLURM's signal a checkpoint for the requeued job is
    written, and the job is requeued, whatever other signals came. A second Ctrl-C stops at once.

    Every `AlignmentModule` adds this callback to its trainer.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The signal that the run stops for; 0 for none."""
        self.training = False

    def state_dict(self) -> dict[str, Any]:
        """Return the SLURM job that writes a checkpoint, if one does."""
        run = this_run()
        return {} if run is None else {STATE: run}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's signal handlers before it installs them."""
        self.asked, self.training = 0, False
        trainer._signal_connector = _SignalHandlers(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on signals from here on."""
        self.training = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop between two optimizer steps, on all ranks, if any rank got a signal."""
        if not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop within a validation that lies between two steps, if there is only one rank.

        Several ranks wait for the next step, as they may have different numbers of batches here.
        """
        if self.training and trainer.world_size == 1 and not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after training has ended and all files are written, if a signal came before."""
        self.training = False
        connector = trainer._signal_connector
        assert isinstance(connector, _SignalHandlers)
        if self.asked and not connector.requeues(self.asked):  # nothing is left to go on with
            saver = _checkpoint_callback(trainer)
            self._exit_run(trainer, self.asked, saver._last_checkpoint_saved if saver else None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the ranks that this one launched, which would otherwise wait for it.

        If another rank has failed first, it is left to report why.
        """
        if not isinstance(exception, Stopped) and not is_lost_connection(exception):
            _end_launched(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        connector = trainer._signal_connector
        assert isinstance(connector, _SignalHandlers)
        asked = self.asked
        if trainer.world_size > 1:
            told = torch.tensor(connector.weight(asked), device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(told, reduce_op="max")) % _FIRST
        if not asked:
            return
        if not connector.requeues(asked):
            path = _save_last(trainer)
        elif not _is_last_step(trainer):
            path = connector.requeue()
        else:  # what is left is done before SLURM ends the job, and the weights are safe until then
            self.asked = 0
            with _still_to_save(trainer):
                path = _save_last(trainer)
            if trainer.is_global_zero:
                log.info("no step is left: the run ends, and the job is not requeued; see %s", path)
            return
        self._exit_run(trainer, asked, path)

    def _exit_run(self, trainer: Trainer, signum: int, path: str | None) -> NoReturn:
        if trainer.is_global_zero:
            saved = f"{path} holds it" if path else "nothing is saved, as checkpoints are off"
            name = signal.Signals(signum).name
            log.warning("%s: stopped after step %d; %s", name, trainer.global_step, saved)
        # Lightning kills the first rank if a rank that it launched ends with a status above 0.
        raise Stopped(signum, status=0 if _is_launched(trainer) else None)


class _SignalHandlers(_SignalConnector):
    """Record a signal for the callback while a run trains, and stop at once otherwise."""

    def __init__(self, trainer: Trainer, signals: Signals) -> None:
        super().__init__(trainer)
        self.signals = signals
        self.process = os.getpid()
        self.interrupted = False

    def register_signal_handlers(self) -> None:
        """Install the handlers, which also call a user's own for the same signal."""
        self._original_handlers = {}
        self.process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT, self._requeue_signal()):
            if signum is None or signal.getsignal(signum) == signal.SIG_IGN:
                continue
            before = signal.getsignal(signum)
            own = before in (signal.SIG_DFL, signal.default_int_handler, stop_at_once)

            handler = partial(self._note_signal, also=None if own else before)
            self._original_handlers[signum] = before
            signal.signal(signum, handler)

    def requeues(self, signum: int) -> bool:
        """Tell whether SLURM is to start the job again after this signal."""
        environment = self.trainer._accelerator_connector.cluster_environment
        return (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and signum == environment.requeue_signal
            and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        )

    def requeue(self) -> str | None:
        """Save for the requeued job, requeue it, and return the file.

        Where the file has no place, the run's last checkpoint is written, and the job ends.
        """
        path = reserve_checkpoint(self.trainer)
        if path is None:
            return _save_last(self.trainer)
        for logger in self.trainer.loggers:
            logger.finalize("finished")
        with kept_if_whole(path, self.trainer.is_global_zero):
            self.trainer.save_checkpoint(path)
        if self.trainer.is_global_zero:
            requeue_job()
        return path

    def weight(self, signum: int) -> int:
        """Return a number by which signals are compared: the one to go on after is above all."""
        return signum + _FIRST * self.requeues(signum)

    def _requeue_signal(self) -> signal.Signals | None:
        environment = self.trainer._accelerator_connector.cluster_environment
        return environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None

    def _note_signal(self, signum: int, frame: FrameType | None, also: Any) -> None:
        if os.getpid() != self.process:  # a worker that was forked from the training process
            return
        again = signum == signal.SIGINT and self.interrupted
        self.interrupted = self.interrupted or signum == signal.SIGINT
        if again or not self.signals.training:
            _end_launched(self.trainer)
            stop_at_once(signum)
        if not self.signals.asked:
            end = "; once more stops at once" if signum == signal.SIGINT else ""
            write_line(f"{signal.Signals(signum).name}: finishing this step, then saving{end}")
        self.signals.asked = max(self.signals.asked, signum, key=self.weight)
        if callable(also):
            also(signum, frame)


def _is_last_step(trainer: Trainer) -> bool:
    """Tell whether the step that was taken is the last one of the run."""
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = loop.max_epochs
    last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


@contextmanager
def _still_to_save(trainer: Trainer) -> Iterator[None]:
    """Let a run save after a step what it saves by itself, whatever is saved within the block."""
    saver = _checkpoint_callback(trainer)
    names = ("_last_global_step_saved", "_last_checkpoint_saved")
    before = {name: getattr(saver, name) for name in names} if saver is not None else {}
    yield
    for name, value in before.items():
        setattr(saver, name, value)


def _save_last(trainer: Trainer) -> str | None:
    """Write ``last.ckpt`` and return its path, ``None`` if the run keeps no checkpoints."""
    saver = _checkpoint_callback(trainer)
    if saver is None:
        return None
    kept, saver.save_last = saver.save_last, True
    saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
    saver.save_last = kept
    return saver.last_model_path


def _checkpoint_callback(trainer: Trainer) -> ModelCheckpoint | None:
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return next((c for c in savers if c.save_last), savers[0])


def _end_launched(trainer: Trainer) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)


def _is_launched(trainer: Trainer) -> bool:
    launcher = trainer.strategy.launcher
    return (
        isinstance(launcher, _SubprocessScriptLauncher)
        and not launcher.cluster_environment.creates_processes_externally
        and trainer.local_rank > 0
    )
