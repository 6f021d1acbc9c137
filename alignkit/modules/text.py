"""Keep a run's text format, which says how text became tokens, and compare it with others."""

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

    One line warns where the initial weights were trained with another format, because the model
    then has to learn the new one.

    Args:
        trainer: The run's trainer.
        model: The model that trains.
        base: The model's name.
        before: The format that the weights were trained with, which is returned where the data
            module has none.

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
        _warn_of_other_text(
            "model.init_from", own.differences(before, "prompt_format", "chat_template")
        )
    return own


def format_of_checkpoint(
    trainer: Trainer | None, checkpoint: Mapping[str, Any], before: TextFormat | None
) -> TextFormat | None:
    """Return the text format of a module after it has loaded a checkpoint.

    Args:
        trainer: The run's trainer, or ``None`` without a run.
        checkpoint: The checkpoint that is loaded.
        before: The module's format so far, which is returned where nothing else tells one.

    Raises:
        AlignkitError: The run would resume with another text format.
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
    _warn_of_other_text("ckpt_path", told)
    return before


def _warn_of_other_text(where: str, told: list[str]) -> None:
    if told:
        log.warning("%s: was trained with other text (data: %s)", where, ", ".join(told))
