"""Attention over a packed row, for any transformers model that uses ``AttentionInterface``.

The function registered as ``alignkit`` is transformers' own SDPA until a forward call carries a
``plan``; generation, evaluation with padded batches and everything else is therefore unchanged.
With a plan, a token attends to its own prompt and to what precedes it in its own response.

Shape letters: T row tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkit.batch import Span
from alignkit.engine.segments import AttentionPlan, DenseAttention, SegmentAttention
from alignkit.engine.tiles import TiledAttention
from alignkit.engine.varlen import VarlenAttention, varlen_refusal
from alignkit.errors import AlignkitError

IMPLEMENTATION = "alignkit"
log = logging.getLogger(__name__)

# What models hand their attention beside queries, keys and values that changes nothing in it:
# positions are in the queries already, and the rest asks for outputs that nobody reads here.
# Anything else that is set may change who sees whom or how scores are formed.
_HARMLESS = ("position_ids", "cache_position")
_HARMLESS_IF_OFF = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")


# Policy and reference score the same row: it is laid out once.
@lru_cache(maxsize=2)
def make_plan(spans: tuple[Span, ...], device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """Choose and lay out attention for one row on one device.

    Args:
        spans: The row's examples.
        device: Where queries, keys and values live.
        dtype: Their dtype.

    Returns:
        On the CPU `TiledAttention` in bf16, `SegmentAttention` otherwise; on CUDA
        `VarlenAttention` where it is proven on this device, `DenseAttention` otherwise. Which one
        was taken and why is logged once.
    """
    # A plan made while scoring a reference under inference mode also serves the policy.
    with torch.inference_mode(False):
        if device.type == "cpu":
            tiled = dtype == torch.bfloat16
            _log_cpu_choice(tiled, dtype)
            return TiledAttention(spans, dtype) if tiled else SegmentAttention(spans, device)
        refusal = varlen_refusal(device, dtype)
        if refusal:
            return DenseAttention(spans, device)
        return VarlenAttention(spans, device, dtype)


@lru_cache
def _log_cpu_choice(tiled: bool, dtype: torch.dtype) -> None:
    if tiled:
        log.info("attention on cpu: batched tiles")
    else:
        log.info("attention on cpu: SDPA per example, as tiles only pay in bf16, not %s", dtype)


# A plan differs with every row: a compiled block would be compiled anew for each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The ``AttentionInterface`` function: SDPA as transformers calls it, or a packed row.

    Args:
        module: The calling attention layer.
        query: [1, H, T, D]; key and value: [1, K, T, D].
        attention_mask: Ignored with a plan.
        scaling: Factor on the scores; ``None`` for 1/√D.
        dropout: Probability on the attention weights.
        plan: From `make_plan`; travels as a keyword of the model's forward.
        **kwargs: What else the model hands its attention.

    Returns:
        [1, T, H, D] attention output, and ``None`` for the weights.

    Raises:
        AlignkitError: The model uses an attention variant that a packed row does not express.
    """
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_the_unknown(module, query, key, kwargs)
    return plan(query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None


def _refuse_the_unknown(
    module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> None:
    """Refuse by name what a packed row does not express; nothing unknown is swallowed."""
    for name, value in kwargs.items():
        if (
            value is None
            or name in _HARMLESS
            or (name in _HARMLESS_IF_OFF and value is False)
            or (name == "is_causal" and value is True)
        ):
            continue
        raise AlignkitError(
            f"model: {type(module).__name__} uses {name}, which packed rows do not support; "
            "use a model with plain causal attention"
        )
    if query.shape[2] != key.shape[2] or getattr(module, "is_causal", True) is False:
        raise AlignkitError(
            f"model: {type(module).__name__} attends beyond what precedes a token, which packed "
            "rows do not support; use a model with plain causal attention"
        )


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return what makes hidden states of tokens: the model without its head.

    Raises:
        AlignkitError: The model has no such part.
    """
    # A few classes name a part they do not have; the part is the one model inside them.
    inside = [m for m in model.children() if isinstance(m, PreTrainedModel)]
    if model.base_model is not model:
        return model.base_model
    if len(inside) == 1:
        return inside[0]
    raise AlignkitError(
        f"model: {type(model).__name__} has no part of its own below its head; "
        "use a gpt2, gpt_neox or llama-like model"
    )


def use_packed_attention(model: PreTrainedModel) -> None:
    """Route the model's attention through `packed_attention_forward`; a no-op the second time.

    Raises:
        AlignkitError: The model's class does not go through ``AttentionInterface``.
    """
    if model.config._attn_implementation == IMPLEMENTATION:
        return
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise AlignkitError(
            f"model: {type(model).__name__} does not support transformers' AttentionInterface; "
            "use a gpt2, gpt_neox or llama-like model"
        )


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)
# With the mask function registered, forwards without a plan get SDPA's masks; a forward with a
# plan passes a 4-D placeholder, which transformers hands on untouched.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
