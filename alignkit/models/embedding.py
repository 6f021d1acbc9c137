"""Refuse token ids that a model has no embedding for, before they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size


def refuse_small_embedding(
    model: PreTrainedModel, vocabulary: int, tokenizer: str, base: str
) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding.

    Args:
        model: With or without adapters.
        vocabulary: One above the tokenizer's largest id; 0 where that is unknown.
        tokenizer: Its name, for the message.
        base: The model's name.

    Raises:
        AlignkitError: There are such ids, used or not. The message names both sizes.
    """
    embeddings = embedding_size(model)
    if vocabulary > embeddings:
        raise AlignkitError(
            f"tokenizer '{tokenizer}': has {vocabulary:,} token ids and the model '{base}' "
            f"{embeddings:,} embeddings; pass the tokenizer that belongs to the model, or train "
            "with --model.resize_embeddings true, which adds rows for the others"
        )


def refuse_unknown_ids(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse a batch with ids that the model has no embedding for.

    alignkit's own data modules are checked before a run starts. This check is for other data, which
    would else end in an index error or a device that hangs.

    Args:
        model: With or without adapters.
        input_ids: [T]. They are checked on the CPU alone, since reading them elsewhere would wait
            for the device.

    Raises:
        AlignkitError: The batch holds such an id.
    """
    if input_ids.is_cpu and input_ids.numel():
        least, most = (int(value) for value in torch.aminmax(input_ids))
        size = embedding_size(model)
        if not 0 <= least <= most < size:
            raise AlignkitError(
                f"data: a batch holds the token id {most if least >= 0 else least:,}, and the "
                f"model has {size:,} embeddings; encode with the model's own tokenizer"
            )
