"""Make a module work with Lightning's precisions, callbacks and tuners."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules.alike import start_alike
from alignkit.modules.averaging import AVERAGED
from alignkit.modules.companions import (
    check_callbacks,
    make_states_plain,
    refuse_averaged,
    searches_batch_size,
    set_up_callbacks,
)
from alignkit.modules.precision import (
    apply_but_keep_fp32,
    cast_before_restore,
    keep_batches_uncast,
    warn_of_slow_products,
)
from alignkit.modules.sharding import set_up_sharding
from alignkit.modules.state import keep_trained_state
from alignkit.modules.steps import ExactSteps
from alignkit.modules.tuning import learning_rate, with_learning_rate
from alignkit.utils.plain import plain, without_objects

log = logging.getLogger(__name__)


class TrainerSupport(ExactSteps):
    """Train in exact steps under Lightning's precisions, together with its callbacks and tuners.

    Args:
        *args: As in `ExactSteps`.

    Attributes:
        averaged: Whether the trained weights were replaced by an average.
        resumes: Whether the run resumes from a checkpoint.
    """

    model: PreTrainedModel
    lora: LoRAConfig | None
    lora_plus_ratio: float
    optimizer: OptimizerCallable
    averaged = False
    resumes = False
    _found_lr = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        keep_trained_state(self)

    @property
    def lr(self) -> float:
        """Return the learning rate before warm-up and schedule, which tuners find and set.

        Raises:
            AlignkitError: The optimizer has no learning rate.
        """
        return learning_rate(self.optimizer)

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer = with_learning_rate(self.optimizer, value)
        self._found_lr = True

    def configure_callbacks(self) -> list[Callback]:
        """Refuse callbacks that cannot work with the module; add none."""
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer, self.lora_plus_ratio != 1)
        return []

    def setup(self, stage: str) -> None:
        """Refuse a precision that would train wrongly, cast as it asks, and start as rank 0."""
        if stage == "fit" and self.trainer.is_global_zero and self.trainer.checkpoint_callbacks:
            for name in self.hparams.keys() - without_objects(self.hparams).keys():
                log.warning(
                    "model.%s: is a %s, which checkpoints do not keep, as they hold plain values; "
                    "give it to load_from_checkpoint, or give its class a to_dict",
                    name, type(self.hparams[name]).__name__,
                )  # fmt: skip
        set_up_sharding(self, self.trainer)
        keep_batches_uncast(self.trainer)
        cast_before_restore(self, trained_in_full=self.lora is None)
        warn_of_slow_products(self.trainer, self.model.dtype)
        start_alike(self, self.trainer.strategy.root_device)
        self.averaged = self.resumes = False
        self.position.load({})  # a tuner's trial run may have restored a position
        set_up_callbacks(self.trainer, self)

    def on_fit_start(self) -> None:
        """Make the optimizer again if a tuner has changed its learning rate or the batch size."""
        if self._found_lr or searches_batch_size(self.trainer):
            self._found_lr = False
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make what is no tensor loadable without unpickling, and mark averaged weights."""
        super().on_save_checkpoint(checkpoint)
        make_states_plain(checkpoint.get("callbacks", {}))
        for name in checkpoint.keys() - {"callbacks", "state_dict"}:
            checkpoint[name] = plain(checkpoint[name])
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = without_objects(checkpoint["hyper_parameters"])
        if self.averaged:
            checkpoint[AVERAGED] = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from averaged weights."""
        refuse_averaged(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self.resumes = True

    def predict_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to predict, and name the command that generates text.

        Raises:
            AlignkitError: Always.
        """
        raise AlignkitError(
            f"{type(self).__name__} has nothing to predict; answer prompts with `alignkit generate`"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TrainerSupport:
        apply_but_keep_fp32(self, partial(super()._apply, recurse=recurse), fn)
        return self
