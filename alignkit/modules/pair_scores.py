"""Score the responses of a batch as a preference loss takes them: pairs, ranked or weighted.

Shape letters: N scored tokens, R responses, B prompts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine import (
    response_lengths,
    response_means,
    response_sums,
    score,
    score_with_stats,
)
from alignkit.modules.reference import Reference
from alignkit.objectives.pairs import PairScores, PreferenceLoss
from alignkit.objectives.ranked import RankedScores


def pair_scores(
    model: PreTrainedModel, batch: PackedBatch, loss: PreferenceLoss | None = None
) -> PairScores:
    """Score a batch under the policy, for a loss or as plain pairs."""
    if loss is None or not loss.weighs_answers:
        logps_N = score(model, batch)
        return arranged(response_sums(weighted(logps_N, batch, loss), batch), batch, loss)
    scored = score_with_stats(model, batch)
    assert scored.collision is not None
    pairs = arranged(response_sums(scored.logps, batch), batch, loss)
    # log w(y) = (1/|y|) Σ_t [log π(y_t) − log Σ_v π(v)²], WPO's equation 2
    likeness_R = response_means(scored.logps.detach() - scored.collision, batch).exp()
    weights = arranged(likeness_R, batch, loss)
    return replace(pairs, chosen_weight=weights.chosen, rejected_weight=weights.rejected)


def reference_pair_scores(
    reference: Reference, batch: PackedBatch, loss: PreferenceLoss
) -> PairScores:
    """Score a batch under the reference, live or from its cache, as a loss takes it."""
    weights_N = token_weights(batch, loss) if loss.weighs_tokens else None
    return arranged(reference.sums(batch, weights_N), batch, loss)


def weighted(logps_N: Tensor, batch: PackedBatch, loss: PreferenceLoss | None) -> Tensor:
    """Return token log-probs times the loss's weights of them, [N] fp32."""
    if loss is None or not loss.weighs_tokens:
        return logps_N
    return logps_N * token_weights(batch, loss)


def arranged(sums_R: Tensor, batch: PackedBatch, loss: PreferenceLoss | None) -> PairScores:
    """Return the sums of responses by prompt: as pairs, or as ranks where the loss takes ranks."""
    lengths_R = response_lengths(batch)
    if loss is None or not loss.ranks:
        return PairScores.from_responses(sums_R, lengths_R)
    counts = [len(span.responses) for span in batch.spans]
    return RankedScores.from_ranked(sums_R, lengths_R, counts)


def token_weights(
    batch: PackedBatch, loss: PreferenceLoss, others_R: Tensor | None = None
) -> Tensor:
    """Return the loss's weight of each scored token, [N] fp32.

    Args:
        batch: The batch.
        loss: The loss, which weighs tokens.
        others_R: [R] int64, the length of the answer that each is compared with; ``None`` for that
            of its pair.
    """
    lengths_R = response_lengths(batch)
    if others_R is None:
        others_R = lengths_R.view(-1, 2).flip(1).flatten()
    index_N = batch.response_index
    first_R = lengths_R.cumsum(0) - lengths_R
    place_N = torch.arange(len(index_N), device=index_N.device) - first_R[index_N]
    return loss.token_weights(place_N, lengths_R[index_N], others_R[index_N])
