"""Signals during training: finish the optimizer step, save, name the file, exit with a status.

Lightning raises a `SystemExit` of status 0 after SIGTERM, in the middle of an accumulation window
and with nothing saved, and knows no Ctrl-C but as a failure.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from alignkit.utils.interrupts import Stopped, stop_at_once, write_line
from alignkit.utils.ranks import is_lost_connection

log = logging.getLogger(__name__)


class Signals(Callback):
    """Ends a run in order when SIGTERM, Ctrl-C or SLURM's requeue signal asks for it.

    The step that is being computed is finished on all ranks, whichever of them was told, then
    ``last.ckpt`` is written and its path logged, and `Stopped` raised: exit status 143 after
    SIGTERM and 130 after Ctrl-C. After SLURM's signal Lightning's own checkpoint for the requeued
    job is written, and the job requeued. A second Ctrl-C stops at once.

    Our modules bring one along; it needs no mention.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The signal to stop for; 0 for none."""
        self.training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's handlers before it installs them."""
        self.asked, self.training = 0, False
        trainer._signal_connector = _Connector(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here there is something to save."""
        self.training = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop between two optimizer steps, where all ranks agree on it."""
        if not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Leave a validation that lies between two steps.

        Among several ranks only the next step does: one may have more batches than another here.
        """
        if self.training and trainer.world_size == 1 and not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after training has ended by itself, and all is saved."""
        self.training = False
        if self.asked:
            saver = _saver(trainer)
            self._leave(trainer, self.asked, saver._last_checkpoint_saved if saver else None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the ranks that a failing first one launched: they would wait for it, or fail too.

        One that failed before is left to say why.
        """
        if not isinstance(exception, Stopped) and not is_lost_connection(exception):
            _end_launched(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = self.asked
        if trainer.world_size > 1:
            told = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(told, reduce_op="max"))
        if not asked:
            return
        connector = trainer._signal_connector
        assert isinstance(connector, _Connector)
        path = connector.requeue(asked) if connector.requeues(asked) else _save_last(trainer)
        self._leave(trainer, asked, path)

    def _leave(self, trainer: Trainer, signum: int, path: str | None) -> NoReturn:
        if trainer.is_global_zero:
            saved = f"{path} holds it" if path else "nothing is saved, as checkpoints are off"
            name = signal.Signals(signum).name
            log.warning("%s: stopped after step %d; %s", name, trainer.global_step, saved)
        # Lightning kills the first rank if one that it launched ends with another status.
        raise Stopped(signum, status=0 if _is_launched(trainer) else None)


class _Connector(_SignalConnector):
    """Handlers that make a note for the callback where there is something to save."""

    def __init__(self, trainer: Trainer, signals: Signals) -> None:
        super().__init__(trainer)
        self.signals = signals
        self.process = os.getpid()
        self.interrupted = False

    def register_signal_handlers(self) -> None:
        """Install the handlers; a user's own for the same signals is called as well."""
        self._original_handlers = {}
        self.process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT, self._requeue_signal()):
            if signum is None or signal.getsignal(signum) == signal.SIG_IGN:
                continue
            before = signal.getsignal(signum)
            own = before in (signal.SIG_DFL, signal.default_int_handler, stop_at_once)

            handler = partial(self._handle, also=None if own else before)
            self._original_handlers[signum] = before
            signal.signal(signum, handler)

    def requeues(self, signum: int) -> bool:
        """Tell whether SLURM is to start the job again after this signal."""
        environment = self.trainer._accelerator_connector.cluster_environment
        return (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and signum == environment.requeue_signal
        )

    def requeue(self, signum: int) -> str:
        """Save for the requeued job and requeue it, as Lightning does; return the file."""
        path = self.trainer._checkpoint_connector.hpc_save_path(self.trainer.default_root_dir)
        self._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
        return path

    def _requeue_signal(self) -> signal.Signals | None:
        environment = self.trainer._accelerator_connector.cluster_environment
        return environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None

    def _handle(self, signum: int, frame: FrameType | None, also: Any) -> None:
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
        self.signals.asked = max(self.signals.asked, signum)
        if callable(also):
            also(signum, frame)


def _save_last(trainer: Trainer) -> str | None:
    """Write ``last.ckpt`` where checkpoints go; return its path, ``None`` if none are kept."""
    saver = _saver(trainer)
    if saver is None:
        return None
    kept, saver.save_last = saver.save_last, True
    saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
    saver.save_last = kept
    return saver.last_model_path


def _saver(trainer: Trainer) -> ModelCheckpoint | None:
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
