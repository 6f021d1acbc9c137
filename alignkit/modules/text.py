"""What a run knows of its text: from the data module, kept in checkpoints, held against others'."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.models.embedding import refuse_small_embedding
from alignkit.models.text_format import TextFormat, format_in

log = logging.getLogger(__name__)


def format_of_run(
    trainer: Trainer, model: PreTrainedModel, base: str, before: TextFormat | None
) -> TextFormat | None:
    """Return the data module's text format, once it and the module are set up.

    Training on from weights that knew another format is said in one line: the model has to learn
    the new one.

    Args:
        trainer: Of the run.
        model: What is trained.
        base: Its name.
        before: The format that the weights were trained with; kept where the data tells none.

    Raises:
        AlignkitError: The tokenizer may give ids that the model has no embedding for.
    """
    data = getattr(trainer, "datamodule", None)
    vocabulary, tokenizer = getattr(data, "vocabulary", 0), getattr(data, "tokenizer", "")
    refuse_small_embedding(model, vocabulary, tokenizer, base)
    own: TextFormat | None = getattr(data, "text_format", None)
    if own is None:
        return before
    documents = before is None or "text" in (own.prompt_format, before.prompt_format)
    if before is not None and not documents and trainer.state.fn == TrainerFn.FITTING:
        _warn("model.init_from", own.differences(before, "prompt_format", "chat_template"))
    return own


def format_of_checkpoint(
    trainer: Trainer | None, checkpoint: Mapping[str, Any], before: TextFormat | None
) -> TextFormat | None:
    """Return the text format to go on with from a checkpoint.

    Args:
        trainer: Of the run; none where the module is loaded without one.
        checkpoint: What is loaded.
        before: The module's format so far; kept where nobody knows another.

    Raises:
        AlignkitError: The run would go on with text put in another way.
    """
    given = format_in(checkpoint, "ckpt_path")
    own: TextFormat | None = getattr(getattr(trainer, "datamodule", None), "text_format", None)
    if given is None or own is None:
        return own or given or before
    told = own.differences(given, "prompt_format", "chat_template", "turns", "max_length")
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and told:
        raise AlignkitError(
            f"ckpt_path: was trained with other text (data: {', '.join(told)}); resume with the "
            "data options that the run started with, or pass it as model.init_from"
        )
    _warn("ckpt_path", told)
    return before


def _warn(where: str, told: list[str]) -> None:
    if told:
        log.warning("%s: was trained with other text (data: %s)", where, ", ".join(told))
