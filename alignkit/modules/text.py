"""What a run knows of its text: from the data module, kept in checkpoints, held against others'."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size
from alignkit.models.text_format import TextFormat

if TYPE_CHECKING:
    from alignkit.modules.base import AlignmentModule

KEY = "text_format"
"""Where a checkpoint keeps the format, as plain values."""

_log = logging.getLogger(__name__)


def format_in(checkpoint: Mapping[str, Any], where: str) -> TextFormat | None:
    """The text format that a checkpoint keeps; ``None`` where its data module told none.

    Raises:
        AlignkitError: It is none this alignkit knows; the message starts with ``where``.
    """
    values = checkpoint.get(KEY)
    return None if values is None else TextFormat.from_dict(values, where)


def take_over(module: AlignmentModule, stage: str) -> None:
    """Take over the data module's text format, once it and the module are set up.

    Training on from weights that knew another format is said in one line: the model has to learn
    the new one.

    Raises:
        AlignkitError: The tokenizer may give ids that the model has no embedding for.
    """
    data = getattr(module.trainer, "datamodule", None)
    refuse_small_embedding(
        module.model, getattr(data, "vocabulary", 0), getattr(data, "tokenizer", ""), module.base
    )
    own, before = getattr(data, "text_format", None), module.text_format
    if own is None:
        return
    if stage == TrainerFn.FITTING and before is not None and "text" not in _kinds(own, before):
        _warn("model.init_from", own.differences(before, "prompt_format", "chat_template"))
    module.text_format = own


def hold_against(module: AlignmentModule, checkpoint: Mapping[str, Any]) -> None:
    """Hold the module's text format against that of the checkpoint it loads.

    Raises:
        AlignkitError: The run would go on with text put in another way.
    """
    given = format_in(checkpoint, "ckpt_path")
    trainer = module._trainer  # none where the module is loaded without one
    own = getattr(getattr(trainer, "datamodule", None), "text_format", None)
    if given is None or own is None:
        module.text_format = own or given or module.text_format
        return
    told = own.differences(given, "prompt_format", "chat_template", "turns", "max_length")
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and told:
        raise AlignkitError(
            f"ckpt_path: was trained with other text (data: {', '.join(told)}); resume with the "
            "data options that the run started with, or pass it as model.init_from"
        )
    _warn("ckpt_path", told)


def refuse_small_embedding(
    model: PreTrainedModel, vocabulary: int, tokenizer: str, base: str
) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding.

    Args:
        model: With or without adapters.
        vocabulary: One above the tokenizer's largest id; 0 where nobody knows.
        tokenizer: Its name, for the message.
        base: The model's.

    Raises:
        AlignkitError: There are such ids, used or not; the message names both sizes.
    """
    embeddings = embedding_size(model)
    if vocabulary > embeddings:
        raise AlignkitError(
            f"tokenizer '{tokenizer}': has {vocabulary:,} token ids and the model '{base}' "
            f"{embeddings:,} embeddings; pass the tokenizer that belongs to the model, or resize "
            "the model's embeddings first (transformers' resize_token_embeddings)"
        )


def refuse_unknown_ids(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse a batch with ids that the model has no embedding for.

    Data modules of ours are refused before they start; this is for data of one's own.

    Args:
        model: With or without adapters.
        input_ids: [T]; looked at on the CPU alone, as a look elsewhere would wait for the device.

    Raises:
        AlignkitError: There is one; a bare index error, or a stuck device, otherwise.
    """
    if input_ids.is_cpu and input_ids.numel():
        least, most = (int(value) for value in torch.aminmax(input_ids))
        size = embedding_size(model)
        if not 0 <= least <= most < size:
            raise AlignkitError(
                f"data: a batch holds the token id {most if least >= 0 else least:,}, and the "
                f"model has {size:,} embeddings; encode with the model's own tokenizer"
            )


def _kinds(*formats: TextFormat) -> set[str]:
    return {each.prompt_format for each in formats}


def _warn(where: str, told: list[str]) -> None:
    if told:
        _log.warning("%s: was trained with other text (data: %s)", where, ", ".join(told))
