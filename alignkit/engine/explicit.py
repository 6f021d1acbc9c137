"""Compute attention whose scores are capped or share their softmax with a sink.

A soft-cap bounds the scores (Gemma 2, arXiv:2408.00118, section 2). A sink is a learned score that
adds a column without a value to the softmax (gpt-oss, arXiv:2508.10925).

Shape letters: T row tokens, H query heads, K key heads, D head width, L tokens of an example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alignkit.batch import Span
from alignkit.engine.segments import Reach, example_mask


class ExplicitAttention:
    """Attend one example at a time, with fp32 scores that the backward pass computes again.

    Args:
        spans: The row's examples.
        device: Where queries, keys and values live.
        reach: Which earlier tokens a query sees; ``None`` for all of them.
    """

    def __init__(
        self, spans: Sequence[Span], device: torch.device, reach: Reach | None = None
    ) -> None:
        self.lengths = [span.end - span.start for span in spans]
        self.masks = [example_mask(span, reach).to(device) for span in spans]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        dropout: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Compute the attention of [1, H, T, D] queries to [1, K, T, D] keys and values.

        Args:
            query, key, value: The row's.
            scaling: Factor on the scores; ``None`` for 1/√D.
            dropout: Probability on the attention weights.
            softcap: c of ``c tanh(s / c)`` over the scaled scores s.
            sinks_H: [H], the score of each head's sink.

        Returns:
            [1, H, T, D].
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        parts = zip(
            torch.split(query, self.lengths, dim=2),
            torch.split(key, self.lengths, dim=2),
            torch.split(value, self.lengths, dim=2),
            self.masks,
            strict=True,
        )
        outputs = []
        for q, k, v, mask_LL in parts:
            arguments = (q, k, v, mask_LL, scale, dropout, softcap, sinks_H)
            if torch.is_grad_enabled():
                outputs.append(checkpoint(_attend_example, *arguments, use_reentrant=False))
            else:
                outputs.append(_attend_example(*arguments))
        return torch.cat(outputs, dim=2)


def _attend_example(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_LL: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask_LL, float("-inf"))
    if sinks_H is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    weights = F.dropout(weights, dropout, training=dropout > 0.0)
    return weights.to(value.dtype) @ value
