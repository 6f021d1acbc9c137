"""Register attention over packed rows in transformers' ``AttentionInterface``.

The function registered as ``alignkit`` calls transformers' own attention, unless it gets a mask
that stands for a packed row. Generation and evaluation with padded batches are therefore unchanged.
With such a mask, a token attends to its own prompt and to the earlier tokens of its own response,
as far as its layer reaches.

Shape letters: T row tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from alignkit.engine.row import is_row_in_flight, layer_attention, mask_function
from alignkit.errors import AlignkitError

IMPLEMENTATION = "alignkit"
OVER_EAGER = "alignkit_eager"
"""Name of the same function for classes whose attention SDPA cannot compute."""

# Arguments beside queries, keys and values that models hand their attention and that change nothing
# in it. Positions are in the queries already, a window is in the mask, and the others ask for
# outputs that nobody reads here. Any other argument may change what a token sees or how scores are
# computed.
_IGNORED = ("position_ids", "cache_position", "sliding_window")
_IGNORED_IF_FALSE = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")


# A mask stands for another row each time, so that a compiled block would be compiled again for it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plain: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over a packed row, or call transformers' own for any other mask.

    Args:
        module: The calling attention layer.
        query: [1, H, T, D]; key and value: [1, K, T, D].
        attention_mask: A mask from `alignkit.engine.row.mask_function`, or any other.
        scaling: Factor on the scores; ``None`` for 1/√D.
        dropout: Probability on the attention weights.
        softcap: c of ``c tanh(s / c)`` over the scaled scores s.
        s_aux: [H], the score of each head's sink, which adds a column to the softmax.
        plain: The function that transformers would call.
        **kwargs: Further arguments from the model.

    Returns:
        [1, T, H, D] attention output, and ``None`` for the weights.

    Raises:
        AlignkitError: The model uses an attention variant that a packed row does not express.
    """
    layer = layer_attention(attention_mask)
    if layer is None:
        if is_row_in_flight():
            raise AlignkitError(
                f"model: {type(module).__name__} makes or edits its masks itself, which packed "
                "rows do not support; use a model with plain causal attention"
            )
        for name, given in (("softcap", softcap), ("s_aux", s_aux)):
            if given is not None:
                kwargs[name] = given
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown_arguments(module, query, key, kwargs)
    if softcap is None and s_aux is None:
        output = layer.plan(query, key, value, scaling, dropout)
    else:
        output = layer.explicit(query, key, value, scaling, dropout, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _refuse_unknown_arguments(
    module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> None:
    """Refuse by name any argument that attention over a packed row does not understand."""
    for name, value in kwargs.items():
        if (
            value is None
            or name in _IGNORED
            or (name in _IGNORED_IF_FALSE and value is False)
            or (name == "is_causal" and value is True)
        ):
            continue
        raise AlignkitError(
            f"model: {type(module).__name__} uses {name}, which packed rows do not support; "
            "use a model with plain causal attention"
        )
    if query.shape[2] != key.shape[2]:
        raise AlignkitError(
            f"model: {type(module).__name__} attends to other tokens than the row's, which packed "
            "rows do not support; use a model with plain causal attention"
        )


def _eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Apply the eager attention that the layer's own file defines."""
    forward = sys.modules[type(module).__module__].eager_attention_forward
    output: tuple[Tensor, Tensor | None] = forward(module, *args, **kwargs)
    return output


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head, which turns tokens into hidden states.

    Raises:
        AlignkitError: The model has no such part.
    """
    if model.base_model is not model:
        return model.base_model  # type: ignore[return-value]
    # A few classes name a part that they do not have. It is then the one model inside them.
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) == 1:
        return inside[0]
    raise AlignkitError(
        f"model: {type(model).__name__} has no part of its own below its head; "
        "use a gpt2, gpt_neox or llama-like model"
    )


def use_packed_attention(model: PreTrainedModel) -> None:
    """Set `packed_attention_forward` as the model's attention; a second call changes nothing.

    Raises:
        AlignkitError: The model's class does not go through ``AttentionInterface``.
    """
    name = IMPLEMENTATION if model._supports_sdpa else OVER_EAGER
    if model.config._attn_implementation == name:
        return
    if model._can_set_attn_implementation():  # if not, trying logs a warning and does nothing
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise AlignkitError(
            f"model: {type(model).__name__} does not support transformers' AttentionInterface; "
            "use a gpt2, gpt_neox or llama-like model"
        )


def use_own_attention(model: PreTrainedModel) -> None:
    """Set transformers' own attention for a model that has another; else change nothing.

    Some layers choose their code by the name of their implementation, and do not know ours.
    """
    own = "sdpa" if model._supports_sdpa else "eager"
    if model.config._attn_implementation != own:
        model.set_attn_implementation(own)


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)
AttentionInterface.register(OVER_EAGER, partial(packed_attention_forward, plain=_eager_attention))
AttentionMaskInterface.register(IMPLEMENTATION, mask_function(sdpa_mask))
AttentionMaskInterface.register(OVER_EAGER, mask_function(eager_mask))
