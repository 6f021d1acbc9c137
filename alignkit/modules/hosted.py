"""What makes a module at home in Lightning: its precisions, callbacks and tuners."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules.averaging import AVERAGED
from alignkit.modules.companions import (
    attend,
    check_callbacks,
    keep_plain,
    refuse_averaged,
    searches_batch_size,
)
from alignkit.modules.precision import apply_but_keep_buffers, convert_early, leave_batches
from alignkit.modules.state import keep_trained_state
from alignkit.modules.steps import ExactSteps
from alignkit.modules.tuning import learning_rate, with_learning_rate


class Hosted(ExactSteps):
    """Exact steps under any precision of Lightning, beside any of its callbacks.

    Args:
        *args: As in `ExactSteps`.

    Attributes:
        averaged: Whether an average has taken the place of the weights that were trained.
        resumes: Whether the run goes on from a checkpoint.
    """

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
        """The optimizer's learning rate before warm-up and schedule: what tuners find and set.

        Raises:
            AlignkitError: The optimizer has none.
        """
        return learning_rate(self.optimizer)

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer = with_learning_rate(self.optimizer, value)
        self._found_lr = True

    def configure_callbacks(self) -> list[Callback]:
        """Refuse callbacks that could not do what they are for; add none."""
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer, self.lora_plus_ratio != 1)
        return []

    def setup(self, stage: str) -> None:
        """Refuse a precision that would not train rightly, and cast as the others ask."""
        leave_batches(self.trainer)
        convert_early(self, trained_in_full=self.lora is None)
        self.averaged = self.resumes = False
        self.position.load({})  # what a tuner restored is of its own run
        attend(self.trainer, self)

    def on_fit_start(self) -> None:
        """Make the optimizer anew where a tuner has found what it goes by."""
        if self._found_lr or searches_batch_size(self.trainer):
            self._found_lr = False
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint loadable without unpickling, and say whose weights it holds."""
        super().on_save_checkpoint(checkpoint)
        keep_plain(checkpoint.get("callbacks", {}))
        if self.averaged:
            checkpoint[AVERAGED] = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from an average as if it had been trained."""
        refuse_averaged(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self.resumes = True

    def predict_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what a language model is asked for is text.

        Raises:
            AlignkitError: Always.
        """
        raise AlignkitError(
            f"{type(self).__name__} has nothing to predict; answer prompts with `alignkit generate`"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Hosted:
        apply_but_keep_buffers(self, partial(super()._apply, recurse=recurse), fn)
        return self
