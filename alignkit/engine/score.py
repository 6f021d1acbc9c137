"""Score a packed batch: compute the log-probability of each scored token under a model.

Shape letters: T row tokens, N scored tokens, R responses, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine.attention import make_plan
from alignkit.engine.compare import Score
from alignkit.engine.compile import padded_for
from alignkit.engine.fallback import hidden_alone
from alignkit.engine.head import TokenScores
from alignkit.engine.interface import backbone, use_packed_attention
from alignkit.engine.lengths import longest_position
from alignkit.engine.row import PackedRow, row_in_flight
from alignkit.engine.tail import head_scores
from alignkit.engine.verify import Packing, Scorers, fits_a_row, set_packing, verify_scores
from alignkit.engine.whole import in_one_call
from alignkit.errors import AlignkitError
from alignkit.utils.autocast import compute_dtype
from alignkit.utils.exact import exact


def score(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Score a batch's response tokens under a causal language model.

    Args:
        model: Any transformers causal LM (gpt2, gpt_neox and llama families are tested), with or
            without LoRA layers. Where packed rows would be scored wrongly, the model takes one
            sequence a forward.
        batch: On the model's device.

    Returns:
        [N] fp32 natural-log probabilities, in the order of ``batch.target_ids``. They carry
        gradients to the parameters that require them.

    Raises:
        AlignkitError: The scores differ from the model's own, in packed rows and one sequence a
            forward.
    """
    return score_with_stats(model, batch, stats=False).logps


def score_with_stats(model: PreTrainedModel, batch: PackedBatch, stats: bool = True) -> TokenScores:
    """Score a batch, and compute whether each token was the most probable and the entropy.

    Args:
        model: As in `score`.
        batch: As in `score`.
        stats: Whether to compute the statistics, which cost extra passes over the logits.

    Returns:
        `TokenScores` of N tokens.
    """
    _check_positions(model, batch)
    return in_one_call(
        model, lambda: head_scores(model, _hidden_states(model, batch), batch.target_ids, stats)
    )


def states_at(model: PreTrainedModel, batch: PackedBatch, place_R: Tensor) -> Tensor:
    """Compute the hidden state at one place of each response, [R, D].

    Args:
        model: As in `score`.
        batch: As in `score`.
        place_R: [R] int64, indices in the row.
    """
    _check_positions(model, batch)
    index_R = torch.arange(len(place_R), device=place_R.device)
    there = replace(batch, score_from=place_R, response_index=index_R)
    return in_one_call(model, lambda: _hidden_states(model, there))


def _hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return (_hidden_in_row if fits_a_row(model, _SCORERS, batch) else hidden_alone)(model, batch)


def _hidden_in_row(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return last_hidden_state(model, batch)[batch.score_from]


def last_hidden_state(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute the backbone's output for a packed row, [T, D].

    Args:
        model: A model for which packed rows are right.
        batch: On the model's device.
    """
    use_packed_attention(model)
    batch = padded_for(model, batch)
    device = batch.input_ids.device
    dtype = compute_dtype(device.type, backbone(model).dtype)
    row = PackedRow(batch.spans, device, dtype, make_plan(batch.spans, device, dtype))
    with row_in_flight(row):
        output = backbone(model)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # Without a mask of ones, transformers would guess sequences from positions.
            attention_mask=torch.ones(1, batch.num_tokens, dtype=torch.bool, device=device),
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def _check_positions(model: PreTrainedModel, batch: PackedBatch) -> None:
    limit = longest_position(model)
    if limit is not None and batch.longest > limit:
        raise AlignkitError(
            f"data: a sequence of {batch.longest} tokens exceeds the model's {limit} positions; "
            "lower data.max_length (or data.block_size)"
        )


def response_sums(logps_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token log-probs over each response: [N] to [R] fp32; log π(y|x) of DPO (eq. 7).

    They are added up in fp64, since a GPU adds in any order: the sums of equal log-probs are equal,
    and so policy and reference are at the start of a run.
    """
    exact_N = exact(logps_N)
    zeros_R = exact_N.new_zeros(batch.num_responses)
    return zeros_R.index_add(0, batch.response_index, exact_N).to(logps_N.dtype)


def response_lengths(batch: PackedBatch) -> Tensor:
    """Count the scored tokens of each response, [R] int64."""
    index_N = batch.response_index
    # torch.bincount would make the host wait for the largest index from the device.
    zeros_R = index_N.new_zeros(batch.num_responses)
    return zeros_R.index_add(0, index_N, torch.ones_like(index_N))


def response_means(logps_N: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the mean token log-prob of each response, [R] fp32; 0 where nothing is scored."""
    return response_sums(logps_N, batch) / response_lengths(batch).clamp(min=1)


def check_engine(model: PreTrainedModel, packing: Packing = "auto") -> None:
    """Check on a few tokens that scores equal the model's own per-sequence forward.

    The check finds, before any training, a model whose attention the plan does not compute, or
    whose tokens depend on other sequences of the row. Such a model is scored one sequence a
    forward, and the log says so in one line. Lengths that take too long to check now are checked
    when a sequence first reaches them.

    Args:
        model: On any device, in any mode. Neither changes.
        packing: ``require`` refuses a model that packed rows would score wrongly.

    Raises:
        AlignkitError: Scores differ by more than rounding in packed rows and one sequence a
            forward, or cannot be compared.
    """
    set_packing(model, packing)
    verify_scores(model, _SCORERS)


def _logps(hidden: Score) -> Score:
    return lambda model, batch: head_scores(model, hidden(model, batch), batch.target_ids).logps


_SCORERS = Scorers(packed=_logps(_hidden_in_row), alone=_logps(hidden_alone))
