"""Build the model that a stage trains: a base with adapters, or the whole base."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.lora.adapter import adapter_layers, plain_modules
from alignkit.lora.resize import embedding_paths, resize_embeddings, rows_before
from alignkit.lora.targets import shared_weight
from alignkit.models.dropout import zero_dropout
from alignkit.models.fingerprint import BaseIdentity, base_identity
from alignkit.models.load import load_model
from alignkit.models.quantize import Quantization
from alignkit.models.residual import Residual, widen_residual
from alignkit.models.start import Choice, Start

log = logging.getLogger(__name__)


def build_policy(
    base: str,
    choice: Choice,
    start: Start | None = None,
    *,
    dtype: Literal["float32", "bfloat16"],
    random_init: bool,
    dropout: bool,
    quantize: Quantization | None = None,
    residual: Residual = "weights",
    embeddings: int = 0,
) -> tuple[PreTrainedModel, BaseIdentity, LoRAConfig | None]:
    """Load a base, make the parameters to be trained trainable, and copy given weights.

    Args:
        base: Where the base lies, as in `AlignmentModule`.
        choice: The adapter to train.
        start: The weights to start from.
        dtype: Of the base.
        random_init: Draw the base's weights at random.
        dropout: Keep the base's own dropout.
        quantize: Pack the base's linear layers.
        residual: Dtype in which blocks add up.
        embeddings: Rows that the embeddings are to have at least, see `resize_embeddings`.

    Returns:
        The model, the identity of its base as loaded, and the adapter that was injected.

    Raises:
        AlignkitError: The base cannot be loaded, adapters or start do not fit it, or the whole
            model is to be trained in bfloat16.
    """
    model = load_model(
        base, dtype=getattr(torch, dtype), random_init=random_init, quantize=quantize
    )
    identity = base_identity(model)
    resize_embeddings(model, embeddings)
    if start is not None:
        start.resize(model)
    if residual == "float32":
        widen_residual(model)
    if not dropout:
        zero_dropout(model)
    if start is not None:
        lora = start.lora(model, identity, choice)
    else:
        lora = LoRAConfig() if choice == "auto" else choice
    if lora is not None:
        inject_lora(model, lora)
    elif quantize is not None:
        raise AlignkitError(
            "model.quantize: packed weights do not train (model.lora: null); train an adapter, or "
            "leave model.quantize out"
        )
    elif dtype != "float32":
        raise AlignkitError(
            "model.dtype: full fine-tuning (model.lora: null) keeps master weights, which "
            "bfloat16 would round away; set model.dtype to float32 and trainer.precision to "
            "bf16-mixed"
        )
    else:
        model.requires_grad_(True)
    if start is not None:
        start.fill(model)
    _say_what_must_train(model, lora)
    return model, identity, lora


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model's blocks compute their activations again in the backward pass.

    Raises:
        AlignkitError: Its class does not support that.
    """
    if not model.supports_gradient_checkpointing:
        raise AlignkitError(
            f"model.activation_checkpointing: {type(model).__name__} does not support it; leave it "
            "off and lower data.tokens_per_batch"
        )
    # transformers 5.23 has renamed the method, and warns about the old name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _say_what_must_train(model: PreTrainedModel, lora: LoRAConfig | None) -> None:
    """Warn where new rows of the embeddings stay what they start as, the mean of the others."""
    before, paths = rows_before(model), embedding_paths(model)
    if before is None or lora is None:
        return
    layers = adapter_layers(model)
    if all(path in layers for path in paths):
        return
    modules = plain_modules(model)
    tied = shared_weight(modules, paths[:1]) is not None
    log.warning(
        "model.resize_embeddings: %d new token ids keep the mean of the others' embeddings, as "
        "%s do not train; pass --model.lora.modules_to_save '[%s]'%s, or model.lora: null",
        len(modules[paths[0]].get_parameter("weight")) - before,
        " and ".join(path for path in paths if path not in layers),
        ", ".join(paths),
        " --model.lora.untie true" if tied else "",
    )
