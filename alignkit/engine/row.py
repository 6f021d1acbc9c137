"""A packed row on its way through a model.

The model makes its masks itself, a kind of layer at a time: our mask function is handed the model's
own rule of who sees whom, reads off whether that is a window, and gives back a mask that stands for
attention over the row. Layers pass their mask on to the attention function, also when activations
are computed again for the backward pass, and also those that pass on nothing else.

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

from alignkit.batch import Span
from alignkit.engine.attention import make_plan
from alignkit.engine.explicit import ExplicitAttention
from alignkit.engine.segments import AttentionPlan, Reach, Window
from alignkit.errors import AlignkitError

_ROW: ContextVar[PackedRow | None] = ContextVar("alignkit_row", default=None)
_LAYER = "_alignkit_layer"


class LayerAttention:
    """Attention of one kind of layer over one row.

    Args:
        spans: The row's examples.
        device: Where the row lies.
        reach: Whom a query sees among what precedes it; ``None`` for all of it.
        plan: How it attends.
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
        """The same reach, for scores that are capped or share their softmax with a sink."""
        with torch.inference_mode(False):
            return ExplicitAttention(self.spans, self.device, self.reach)


class PackedRow:
    """The masks of one row, by what the model's layers may see.

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
        self.longest = max(span.prompt + max(span.responses) for span in spans)
        self._causal: Tensor | None = None

    def mask(self, given: dict[str, Any]) -> Tensor:
        """Return what stands for a layer's mask: a tensor of no content.

        Args:
            given: What transformers hands a mask function.

        Raises:
            AlignkitError: A token may see what follows it.
        """
        reach = None
        if given.get("mask_function", causal_mask_function) is not causal_mask_function:
            reach = self._reach(given)
        if reach is not None:
            # Layouts are kept by their reach, which only windows can be told apart by.
            make = make_plan if isinstance(reach, Window) else make_plan.__wrapped__
            return self._stand_in(reach, make(self.spans, self.device, self.dtype, reach))
        if self._causal is None:
            self._causal = self._stand_in(None, self.plan)
        return self._causal

    def _stand_in(self, reach: Reach | None, plan: AttentionPlan) -> Tensor:
        mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        setattr(mask, _LAYER, LayerAttention(self.spans, self.device, reach, plan))
        return mask

    def _reach(self, given: dict[str, Any]) -> Reach | None:
        """Evaluate the model's rule on the positions of the longest sequence."""
        seen_LL = _on_one_sequence(given, self.longest, self.device)
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


def _on_one_sequence(given: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """[L, L] bool on the CPU: transformers' own mask of one sequence of that length."""
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
        # Rules made of numbers alone need no device, which would have to be waited for.
        mask = sdpa_mask(**{**one, "device": torch.device("cpu")})
    except RuntimeError:
        mask = sdpa_mask(**{**one, "device": device})
    assert mask is not None  # it is not skipped
    return mask[0, 0].cpu()


@contextmanager
def row_in_flight(row: PackedRow) -> Iterator[None]:
    """Let the masks that a model makes meanwhile stand for attention over the row."""
    token = _ROW.set(row)
    try:
        yield
    finally:
        _ROW.reset(token)


def is_row_in_flight() -> bool:
    """Is a packed row being scored right now?"""
    return _ROW.get() is not None


def layer_attention(mask: Tensor | None) -> LayerAttention | None:
    """Return what a mask stands for; ``None`` for a mask that is one."""
    return getattr(mask, _LAYER, None)


def mask_function(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for ``AttentionMaskInterface``: ``plain`` unless a row is in flight."""

    def make(**given: Any) -> Any:
        row = _ROW.get()
        return plain(**given) if row is None else row.mask(given)

    return make
