"""Compute the log-probabilities of scored tokens from hidden states, without a [T, V] tensor.

Shape letters: N scored tokens, n tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.engine.onednn import fp32_products
from alignkit.utils.autocast import compute_dtype, no_autocast

# Rows of logits that exist at once. 256 x 50k logits in bf16 take 26 MB, which is little beside the
# activations of any model. Larger chunks do not make the matmul faster.
CHUNK = 256
# Rows of a chunk that are in fp32 at once on the CPU, where so many stay in its cache. Other
# devices take a whole chunk at once, since each part would launch a kernel of its own.
CACHED = 16
BLOCK = 4096
"""Entries of the vocabulary whose weights are in fp32 at once, where logits are not rounded."""


@dataclass(frozen=True)
class TokenScores:
    """Hold the log-probabilities of N scored tokens, and statistics of them where asked for.

    Example:
        >>> hidden_ND, target_N = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> scores = token_scores(nn.Linear(4, 8, bias=False), hidden_ND, target_N, stats=True)
        >>> [round(logp, 3) for logp in scores.logps.tolist()]  # all 8 tokens are equally probable
        [-2.079, -2.079]
        >>> scores.correct.tolist()
        [True, False]

    Attributes:
        logps: [N] fp32 natural-log probability of each token.
        correct: [N] bool, whether it was the most probable token; ``None`` unless asked for.
        entropy: [N] fp32 entropy of the predictive distribution in nats; ``None`` unless asked
            for.
        collision: [N] fp32 log Σ_v p_v², the log-probability that two draws from the predictive
            distribution are one token; ``None`` unless asked for.
    """

    logps: Tensor
    correct: Tensor | None = None
    entropy: Tensor | None = None
    collision: Tensor | None = None


@dataclass(frozen=True)
class Curve:
    """Turn a head's outputs z into logits: ``scale z``, or ``cap tanh(scale z / cap)``.

    Example:
        >>> Curve(scale=0.5, cap=30.0)(torch.tensor([0.0, 1e6])).tolist()
        [0.0, 30.0]
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """Return the logits, in fp32 at least; the plain curve returns its input."""
        if self == PLAIN:
            return output
        wide = torch.promote_types(output.dtype, torch.float32)
        scaled = output.to(wide) * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


PLAIN = Curve()
"""Logits are what the head returns."""


def token_scores(
    head: nn.Module,
    hidden_ND: Tensor,
    target_N: Tensor,
    stats: bool = False,
    curve: Curve = PLAIN,
    exact: bool = False,
) -> TokenScores:
    """Score tokens with a model's output head.

    A frozen ``nn.Linear`` (the LoRA case) takes two matmuls a chunk and keeps [N, D] for the
    backward pass. Any other head is trained or carries an adapter. Its backward pass computes the
    logits again, chunk by chunk.

    Args:
        head: Maps [n, D] hidden states to [n, V] logits.
        hidden_ND: [N, D] hidden states that predict the tokens.
        target_N: [N] int64 token ids.
        stats: Also return ``correct``, ``entropy`` and ``collision``.
        curve: Turns the head's outputs into logits.
        exact: Keep a frozen head's products of half-precision values in fp32.

    Returns:
        The scores; ``logps`` carries gradients, the statistics do not.
    """
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        dtype = compute_dtype(hidden_ND.device.type, head.weight.dtype)
        weight_VD, hidden_ND = head.weight.to(dtype), hidden_ND.to(dtype)
        bias_V = None if head.bias is None else head.bias.to(dtype)
        needs_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
        logps, *statistics = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, bias_V, target_N, curve, needs_grad, stats, exact
        )
        return TokenScores(logps, *(statistics if stats else ()))

    def chunk(hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        logp_nV = curve(head(hidden_nD)).log_softmax(-1, dtype=torch.float32)
        logps = logp_nV.gather(1, target_n[:, None])[:, 0]
        return (logps, *(_statistics(logp_nV.detach(), target_n) if stats else ()))

    parts = []
    # At least one part, so that a batch with nothing to score still gives empty tensors.
    for rows in _slices(0, max(len(target_N), 1), CHUNK):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden_ND[rows], target_N[rows], use_reentrant=False))
        else:
            parts.append(chunk(hidden_ND[rows], target_N[rows]))
    return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _statistics(logp_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
    return logp_nV.argmax(-1) == target_n, entropy_n, (2 * logp_nV).logsumexp(-1)


class _FrozenHead(torch.autograd.Function):
    """Compute log softmax(c(h Wᵀ + b))[target] for a frozen W, and its gradient beside it.

    ∂ log p_t / ∂h = c'(z_t) W_t − Σ_v p_v c'(z_v) W_v. Both terms are known while a chunk's logits
    exist. The forward pass therefore keeps G = c'(z_t) W[target] − (softmax(c(z)) ∘ c'(z)) W,
    [N, D], and the backward pass is g · G. The slope c' is ``scale``. Under a cap it is
    ``scale`` (1 − (c(z) / cap)²).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        curve: Curve,
        needs_grad: bool,
        stats: bool,
        exact: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, vocabulary = len(target_N), len(weight_VD)
        logps = hidden_ND.new_empty(count, dtype=torch.float32)
        correct = hidden_ND.new_empty(count if stats else 0, dtype=torch.bool)
        entropy = hidden_ND.new_empty(count if stats else 0, dtype=torch.float32)
        collision = torch.empty_like(entropy)
        gradient_ND = torch.empty_like(hidden_ND) if needs_grad else None
        slope_N1 = hidden_ND.new_empty(count if curve.cap else 0, 1, dtype=torch.float32)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32) if exact else hidden_ND.dtype
        buffer_nV = hidden_ND.new_empty(min(count, CHUNK), vocabulary, dtype=dtype)
        size = CACHED if hidden_ND.device.type == "cpu" else CHUNK
        for chunk in _slices(0, count, CHUNK):
            logits_nV = buffer_nV[: chunk.stop - chunk.start]
            if dtype != hidden_ND.dtype:
                _unrounded_product(hidden_ND[chunk], weight_VD, bias_V, logits_nV)
            elif bias_V is None:
                torch.mm(hidden_ND[chunk], weight_VD.t(), out=logits_nV)
            else:
                torch.addmm(bias_V, hidden_ND[chunk], weight_VD.t(), out=logits_nV)
            for rows in _slices(chunk.start, chunk.stop, size):
                product_mV = logits_nV[rows.start - chunk.start : rows.stop - chunk.start]
                logits_mV = curve(product_mV)
                probability_mV = logits_mV.softmax(-1, dtype=torch.float32)
                # The largest probability is 1 / Σ exp(z - max z), which never underflows.
                log_sum_m = logits_mV.amax(-1).float() - probability_mV.amax(-1).log()
                target_m1 = target_N[rows, None]
                logps[rows] = logits_mV.gather(1, target_m1)[:, 0].float() - log_sum_m
                if stats:
                    correct[rows] = logits_mV.argmax(-1) == target_m1[:, 0]
                    entropy[rows] = log_sum_m - (probability_mV * logits_mV).sum(-1)
                    collision[rows] = probability_mV.square().sum(-1).log()
                if not needs_grad:
                    continue
                if curve.cap is not None:
                    slope_mV = 1 - (logits_mV / curve.cap).square()
                    slope_N1[rows] = slope_mV.gather(1, target_m1)
                    probability_mV *= slope_mV
                product_mV.copy_(probability_mV)
            if gradient_ND is not None:
                wanted_nD = weight_VD[target_N[chunk]]
                if curve.cap is not None:
                    wanted_nD = wanted_nD * slope_N1[chunk].to(wanted_nD.dtype)
                torch.sub(
                    wanted_nD, logits_nV.to(weight_VD.dtype) @ weight_VD, out=gradient_ND[chunk]
                )
        if gradient_ND is not None and curve.scale != 1:
            gradient_ND *= curve.scale
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(correct, entropy, collision)
        return logps, correct, entropy, collision

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient_ND).to(gradient_ND.dtype), *[None] * 7


def _unrounded_product(
    hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, logits_nV: Tensor
) -> None:
    """Write the fp32 products of half-precision values; on a CPU a block of the vocabulary a time.

    The fp32 copies of a block are small. Their products take the bf16 units where there are some,
    which rounds nothing, since the values are bf16 numbers.
    """
    if hidden_nD.is_cuda:
        torch.mm(hidden_nD, weight_VD.t(), out_dtype=torch.float32, out=logits_nV)
    else:
        wide_nD = hidden_nD.float()
        with no_autocast("cpu"), fp32_products(hidden_nD.dtype):
            for block in _slices(0, len(weight_VD), BLOCK):
                logits_nV[:, block] = wide_nD @ weight_VD[block].float().t()
    if bias_V is not None:
        logits_nV += bias_V
