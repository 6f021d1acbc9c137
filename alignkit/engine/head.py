"""Log-probabilities of the scored tokens, straight from hidden states: no [T, V] tensor exists.

Shape letters: N scored tokens, n tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Rows of logits that exist at once. 256 x 50k fp32 logits are 51 MB, small beside the
# activations of any model, and the matmul is already as fast as it gets.
CHUNK = 256


@dataclass(frozen=True)
class TokenScores:
    """What the head says about N scored tokens.

    Attributes:
        logps: [N] fp32 natural-log probability of each token.
        correct: [N] bool, whether it was the most probable token; ``None`` unless asked for.
        entropy: [N] fp32, the predictive distribution's entropy in nats; ``None`` likewise.
    """

    logps: Tensor
    correct: Tensor | None = None
    entropy: Tensor | None = None


def token_scores(
    head: nn.Module, hidden_ND: Tensor, target_N: Tensor, stats: bool = False
) -> TokenScores:
    """Score tokens with a model's output head.

    A frozen ``nn.Linear`` (the LoRA case) takes two matmuls a chunk and keeps [N, D] for the
    backward pass; any other head (trained, or carrying an adapter) recomputes its logits chunk
    by chunk in the backward pass.

    Args:
        head: Maps [n, D] hidden states to [n, V] logits.
        hidden_ND: [N, D] hidden states that predict the tokens.
        target_N: [N] int64 token ids.
        stats: Also return ``correct`` and ``entropy``.

    Returns:
        The scores; ``logps`` carries gradients, the statistics do not.
    """
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        if torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        else:
            dtype = head.weight.dtype
        weight_VD, hidden_ND = head.weight.to(dtype), hidden_ND.to(dtype)
        bias_V = None if head.bias is None else head.bias.to(dtype)
        needs_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
        logps, correct, entropy = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, bias_V, target_N, needs_grad, stats
        )
        return TokenScores(logps, *((correct, entropy) if stats else (None, None)))

    def chunk(hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logp_nV = head(hidden_nD).log_softmax(-1, dtype=torch.float32)
        logps = logp_nV.gather(1, target_n[:, None])[:, 0]
        return (logps, *(_statistics(logp_nV.detach(), target_n) if stats else (None, None)))

    parts = []
    for rows in _chunks(len(target_N)):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden_ND[rows], target_N[rows], use_reentrant=False))
        else:
            parts.append(chunk(hidden_ND[rows], target_N[rows]))
    logps, correct, entropy = zip(*parts, strict=True)
    if not stats:
        return TokenScores(torch.cat(logps))
    return TokenScores(torch.cat(logps), torch.cat(correct), torch.cat(entropy))


def _chunks(count: int) -> Iterator[slice]:
    # At least one, so that a batch with nothing to score still gives empty tensors.
    return (slice(start, start + CHUNK) for start in range(0, max(count, 1), CHUNK))


def _statistics(logp_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
    return logp_nV.argmax(-1) == target_n, -(logp_nV.exp() * logp_nV).sum(-1)


class _FrozenHead(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] for a frozen W, with its gradient made in the forward pass.

    ∂ log p_t / ∂h = W_t − Σ_v p_v W_v. Both terms are known while a chunk's logits exist, so the
    forward pass keeps G = W[target] − softmax(z) W, [N, D], and the backward pass is g · G.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        needs_grad: bool,
        stats: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(target_N)
        logps = hidden_ND.new_empty(count, dtype=torch.float32)
        correct = hidden_ND.new_empty(count if stats else 0, dtype=torch.bool)
        entropy = hidden_ND.new_empty(count if stats else 0, dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if needs_grad else None
        for rows in _chunks(count):
            logits_nV = nn.functional.linear(hidden_ND[rows], weight_VD, bias_V)
            logp_nV = logits_nV.log_softmax(-1, dtype=torch.float32)
            logps[rows] = logp_nV.gather(1, target_N[rows, None])[:, 0]
            if stats:
                correct[rows], entropy[rows] = _statistics(logp_nV, target_N[rows])
            if gradient_ND is not None:
                probability_nV = logp_nV.exp_().to(weight_VD.dtype)
                gradient_ND[rows] = weight_VD[target_N[rows]] - probability_nV @ weight_VD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(correct, entropy)
        return logps, correct, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient_ND).to(gradient_ND.dtype), *[None] * 5
