"""Give a packed row's attention to a model's layers, through the masks that the model makes.

The model makes a mask for each kind of layer. Our mask function gets the model's own rule of which
tokens a token sees, reads off whether that is a window, and returns a mask that stands for
attention over the row. Every layer passes its mask on to the attention function, also when
activations are computed again for the backward pass.

Shape letters: T row tokens, L tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from alignkit.batch import Span, longest
from alignkit.engine.attention import make_plan
from alignkit.engine.explicit import ExplicitAttention
from alignkit.engine.segments import AttentionPlan, Reach, Window
from alignkit.errors import AlignkitError
from alignkit.utils.real import on_real_tensors

_CURRENT_ROW: ContextVar[PackedRow | None] = ContextVar("alignkit_row", default=None)
# Attribute of a mask that stands for attention over a row.
_LAYER_ATTENTION = "_alignkit_layer_attention"


class LayerAttention:
    """Hold how one kind of layer attends over one row.

    Args:
        spans: The row's examples.
        device: Where the row lies.
        reach: Which earlier tokens a query sees; ``None`` for all of them.
        plan: How the layer attends.
    """

    def __init__(
        self,
        spans: tuple[Span, ...],
        device: torch.device,
        reach: Reach | None,
        plan: AttentionPlan,
    ) -> None:
        self.spans, self.device, self.reach, self.plan = spans, device, reach, plan

    @cached_property
    def explicit(self) -> ExplicitAttention:
        """Return attention of the same reach for scores that are capped or have a sink."""
        with torch.inference_mode(False):
            return ExplicitAttention(self.spans, self.device, self.reach)


class PackedRow:
    """Make the masks of one row for the different kinds of a model's layers.

    Args:
        spans: The row's examples.
        device: Where the row lies.
        dtype: Of queries, keys and values.
        plan: How layers without a reach of their own attend.
    """

    def __init__(
        self,
        spans: tuple[Span, ...],
        device: torch.device,
        dtype: torch.dtype,
        plan: AttentionPlan,
    ) -> None:
        self.spans, self.device, self.dtype, self.plan = spans, device, dtype, plan
        self.longest = longest(spans)
        self._causal_mask: Tensor | None = None

    @on_real_tensors
    def mask(self, given: dict[str, Any]) -> Tensor:
        """Return a tensor without content that stands for a layer's mask.

        Args:
            given: The arguments that transformers hands a mask function.

        Raises:
            AlignkitError: A token may see later tokens.
        """
        reach = None
        if given.get("mask_function", causal_mask_function) is not causal_mask_function:
            reach = self._find_reach(given)
        if reach is not None:
            # Plans are cached by their reach. Only windows can be compared with each other.
            make = make_plan if isinstance(reach, Window) else make_plan.__wrapped__
            return self._placeholder(reach, make(self.spans, self.device, self.dtype, reach))
        if self._causal_mask is None:
            self._causal_mask = self._placeholder(None, self.plan)
        return self._causal_mask

    def _placeholder(self, reach: Reach | None, plan: AttentionPlan) -> Tensor:
        mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        setattr(mask, _LAYER_ATTENTION, LayerAttention(self.spans, self.device, reach, plan))
        return mask

    def _find_reach(self, given: dict[str, Any]) -> Reach | None:
        """Read off the reach from the model's own mask of the longest sequence."""
        seen_LL = _own_mask(given, self.longest, self.device)
        position_L = torch.arange(self.longest)
        distance_LL = position_L[:, None] - position_L
        if (seen_LL & (distance_LL < 0)).any():
            raise AlignkitError(
                f"model: a {given['config'].model_type} of this configuration looks ahead of a "
                "token, which packed rows do not support; use a model with causal attention"
            )
        window = int(seen_LL[-1].sum())
        if torch.equal(seen_LL, (distance_LL >= 0) & (distance_LL < window)):
            return None if window == self.longest else Window(window)
        return lambda query, key: seen_LL[query, key]


def _own_mask(given: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Return transformers' own mask of one sequence of that length, [L, L] bool on the CPU."""
    one = {
        **given,
        "batch_size": 1,
        "q_length": length,
        "kv_length": length,
        "q_offset": 0,
        "kv_offset": 0,
        "attention_mask": None,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }
    try:
        # A rule made of numbers alone is evaluated on the CPU, which saves waiting for the device.
        mask = sdpa_mask(**{**one, "device": torch.device("cpu")})
    except RuntimeError:
        mask = sdpa_mask(**{**one, "device": device})
    assert mask is not None  # for the type checker: the mask is not skipped
    return mask[0, 0].cpu()


@contextmanager
def row_in_flight(row: PackedRow) -> Iterator[None]:
    """Let the masks that a model makes within the context stand for attention over the row."""
    token = _CURRENT_ROW.set(row)
    try:
        yield
    finally:
        _CURRENT_ROW.reset(token)


def is_row_in_flight() -> bool:
    """Tell whether a packed row is being scored."""
    return _CURRENT_ROW.get() is not None


def layer_attention(mask: Tensor | None) -> LayerAttention | None:
    """Return the attention that a mask stands for; ``None`` for an ordinary mask."""
    return getattr(mask, _LAYER_ATTENTION, None)


def mask_function(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for ``AttentionMaskInterface``: ``plain`` unless a row is in flight."""

    def make(**given: Any) -> Any:
        row = _CURRENT_ROW.get()
        return plain(**given) if row is None else row.mask(given)

    return make
