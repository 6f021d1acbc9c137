"""`score`: a model and a packed batch in, the log-probability of every scored token out.

Shape letters: T row tokens, N scored tokens, R responses, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine.attention import make_plan
from alignkit.engine.compile import padded_for
from alignkit.engine.fallback import hidden_alone
from alignkit.engine.head import TokenScores
from alignkit.engine.interface import backbone, use_packed_attention
from alignkit.engine.lengths import longest_position
from alignkit.engine.proof import Packing, Ways, fits_a_row, set_packing, verify_scores
from alignkit.engine.row import PackedRow, row_in_flight
from alignkit.engine.tail import head_scores
from alignkit.errors import AlignkitError
from alignkit.utils.autocast import compute_dtype


def score(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Score a batch's response tokens under a causal language model.

    Args:
        model: Any transformers causal LM (gpt2, gpt_neox and llama families are tested), with or
            without LoRA layers. What does not fit into packed rows goes one sequence a forward.
        batch: On the model's device.

    Returns:
        [N] fp32 natural-log probabilities, in the order of ``batch.target_ids``; differentiable
        in whatever parameters require gradients.

    Raises:
        AlignkitError: Its scores were found to differ from the model's own, be it in packed rows
            or one sequence a forward.
    """
    return score_with_stats(model, batch, stats=False).logps


def score_with_stats(model: PreTrainedModel, batch: PackedBatch, stats: bool = True) -> TokenScores:
    """`score`, with each token's correctness and predictive entropy beside it.

    Args:
        model: As in `score`.
        batch: As in `score`.
        stats: Whether to compute the statistics, which cost extra passes over the logits.

    Returns:
        `TokenScores` of N tokens.
    """
    _check_positions(model, batch)
    if fits_a_row(model, _WAYS, batch):
        hidden_ND = _last_hidden_state(model, batch)[batch.score_from]
    else:
        hidden_ND = hidden_alone(model, batch)
    return head_scores(model, hidden_ND, batch.target_ids, stats)


def _last_hidden_state(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    use_packed_attention(model)
    batch = padded_for(model, batch)
    device = batch.input_ids.device
    dtype = compute_dtype(device.type, model.dtype)
    row = PackedRow(batch.spans, device, dtype, make_plan(batch.spans, device, dtype))
    with row_in_flight(row):
        output = backbone(model)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # With a mask, all of ones, transformers does not guess sequences from positions.
            attention_mask=torch.ones(1, batch.num_tokens, dtype=torch.bool, device=device),
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def _check_positions(model: PreTrainedModel, batch: PackedBatch) -> None:
    limit = longest_position(model)
    longest = batch.longest
    if limit is not None and longest > limit:
        raise AlignkitError(
            f"data: a sequence of {longest} tokens exceeds the model's {limit} positions; lower "
            "data.max_length (or data.block_size)"
        )


def response_sums(logps_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token log-probs over each response: [N] to [R] fp32; log π(y|x) of DPO (eq. 7)."""
    return logps_N.new_zeros(batch.num_responses).index_add(0, batch.response_index, logps_N)


def response_lengths(batch: PackedBatch) -> Tensor:
    """Number of scored tokens of each response, [R] int64."""
    index_N = batch.response_index
    # bincount would ask the device for the largest index, which makes the host wait.
    zeros_R = index_N.new_zeros(batch.num_responses)
    return zeros_R.index_add(0, index_N, torch.ones_like(index_N))


def response_means(logps_N: Tensor, batch: PackedBatch) -> Tensor:
    """Mean token log-prob of each response, [R] fp32; 0 for a response without scored tokens."""
    return response_sums(logps_N, batch) / response_lengths(batch).clamp(min=1)


def check_engine(model: PreTrainedModel, packing: Packing = "auto") -> None:
    """Prove on a few tokens that scores equal the model's own per-sequence forward.

    Catches, before any training, a model whose attention is not what the plan computes, or whose
    tokens depend on their neighbours in the row: it is scored one sequence a forward, which one
    line of the log announces. Lengths at which the model may change and that are too long to try
    now are tried when a sequence first reaches them.

    Args:
        model: On any device, in any mode; both stay as they are.
        packing: ``require`` refuses what packed rows do not express.

    Raises:
        AlignkitError: The two disagree by more than rounding either way, or cannot be compared.
    """
    set_packing(model, packing)
    verify_scores(model, _WAYS)


def _packed_logps(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    hidden_ND = _last_hidden_state(model, batch)[batch.score_from]
    return head_scores(model, hidden_ND, batch.target_ids).logps


def _lone_logps(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return head_scores(model, hidden_alone(model, batch), batch.target_ids).logps


_WAYS = Ways(packed=_packed_logps, alone=_lone_logps)
