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

from alignkit.engine.batch import Span
from alignkit.engine.segments import AttentionPlan, DenseAttention, SegmentAttention
from alignkit.engine.tiles import TiledAttention
from alignkit.engine.varlen import VarlenAttention, varlen_refusal
from alignkit.errors import AlignkitError

IMPLEMENTATION = "alignkit"
log = logging.getLogger(__name__)

# Attention variants that change who sees whom or how scores are formed; a packed row would be
# silently wrong under them.
_UNSUPPORTED = ("sliding_window", "softcap", "position_bias", "s_aux")


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
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise AlignkitError(
                f"model: {type(module).__name__} uses {name}, which packed rows do not support; "
                "use a model with plain causal attention"
            )
    return plan(query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None


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
