"""The model that a stage trains: a base with adapters, or the whole base."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models import base_fingerprint, load_model
from alignkit.models_dropout import zero_dropout


def build_policy(
    base: str,
    lora: LoRAConfig | None,
    *,
    dtype: Literal["float32", "bfloat16"],
    random_init: bool,
    dropout: bool,
) -> tuple[PreTrainedModel, str]:
    """Load a base and make what is to be trained of it trainable.

    The arguments are `AlignmentModule`'s.

    Returns:
        The model, and the fingerprint of its base as loaded.

    Raises:
        AlignkitError: The base cannot be loaded, the adapters do not fit it, or the whole model
            is to be trained in bfloat16.
    """
    model = load_model(base, dtype=getattr(torch, dtype), random_init=random_init)
    fingerprint = base_fingerprint(model)
    if not dropout:
        zero_dropout(model)
    if lora is not None:
        return inject_lora(model, lora), fingerprint
    if dtype != "float32":
        raise AlignkitError(
            "model.dtype: full fine-tuning (model.lora: null) keeps master weights, which "
            "bfloat16 would round away; set model.dtype to float32 and trainer.precision to "
            "bf16-mixed"
        )
    return model.requires_grad_(True), fingerprint
