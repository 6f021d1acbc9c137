"""`score`: a model and a packed batch in, the log-probability of every scored token out.

Shape letters: T row tokens, N scored tokens, R responses, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.autocast import compute_dtype
from alignkit.engine.attention import make_plan, use_packed_attention
from alignkit.engine.batch import Example, PackedBatch, collate
from alignkit.engine.compile import padded_for
from alignkit.engine.head import TokenScores, token_scores
from alignkit.errors import AlignkitError


def score(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Score a batch's response tokens under a causal language model.

    Args:
        model: Any transformers causal LM with plain causal attention (gpt2, gpt_neox and llama
            families are tested), with or without LoRA layers.
        batch: On the model's device.

    Returns:
        [N] fp32 natural-log probabilities, in the order of ``batch.target_ids``; differentiable
        in whatever parameters require gradients.

    Raises:
        AlignkitError: The model's attention is not one that packed rows express.
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
    hidden_TD = _last_hidden_state(model, batch)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return token_scores(head, hidden_TD[batch.score_from], batch.target_ids, stats)


def _last_hidden_state(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    use_packed_attention(model)
    _check_positions(model, batch)
    batch = padded_for(model, batch)
    device = batch.input_ids.device
    output = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device),
        use_cache=False,
        plan=make_plan(batch.spans, device, compute_dtype(device.type, model.dtype)),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def _check_positions(model: PreTrainedModel, batch: PackedBatch) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(span.prompt + max(span.responses) for span in batch.spans)
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


@torch.no_grad()
def check_engine(model: PreTrainedModel) -> None:
    """Prove on a few tokens that packed scoring equals the model's own per-sequence forward.

    Catches, before any training, a model whose head does more than one matmul (soft-capping,
    scaling) or whose attention is not plain and causal.

    Raises:
        AlignkitError: The two disagree by more than rounding.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(37 * i + 11) % vocabulary for i in range(24)]
    example = Example(prompt=ids[:9], responses=[ids[9:15], ids[15:24]])
    device = model.device
    batch = collate([example, Example(prompt=[], responses=[ids[3:12]])]).to(device)
    was_training = model.training
    model.train(False)
    try:
        packed = score(model, batch)
        plain = []
        for prompt, response in ((ids[:9], ids[9:15]), (ids[:9], ids[15:24]), ([], ids[3:12])):
            row = torch.tensor([[*prompt, *response]], device=device)
            logp_LV = model(row).logits[0].log_softmax(-1, dtype=torch.float32)
            first = max(len(prompt), 1)
            plain.append(logp_LV[first - 1 : -1].gather(1, row[0, first:, None])[:, 0])
    finally:
        model.train(was_training)
    difference = (packed - torch.cat(plain)).abs().max().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.5
    if not difference <= tolerance:
        raise AlignkitError(
            f"model: packed scores of {type(model).__name__} are off by {difference:.2g} from its "
            "own logits; this architecture is not supported (gpt2, gpt_neox and llama are)"
        )
