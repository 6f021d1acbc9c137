"""Measure where an adapter moved a model: each token's log-probability with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.batch import Example, collate
from alignkit.engine import score
from alignkit.lora import adapter_configs, adapters_disabled
from alignkit.models.text_format import TextFormat
from alignkit.tools.generate.prompts import Question, encode_prompts

Piece = tuple[str, float | None]
"""A token's text, and the log-ratio of its probabilities in nats; ``None`` without an adapter."""


@torch.no_grad()
def moved_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: TextFormat,
    question: Question,
    ids: Sequence[int],
) -> list[Piece]:
    """Return the tokens of an answer with ``log p(token) − log p_base(token)`` of each.

    Args:
        model: The model, whose adapter is active.
        tokenizer: Its tokenizer.
        asked: The text format that the question was asked in.
        question: The question.
        ids: The answer's tokens.
    """
    texts = [str(tokenizer.decode(list(ids[:end]))) for end in range(len(ids) + 1)]
    pieces = [after[len(before) :] for before, after in pairwise(texts)]
    if not ids or not adapter_configs(model):
        return [(piece, None) for piece in pieces]
    (prompt,) = encode_prompts([question], asked, tokenizer)
    batch = collate([Example(prompt=prompt, responses=[list(ids)])]).to(model.device)
    with_it = score(model, batch)
    with adapters_disabled(model):
        without = score(model, batch)
    return list(zip(pieces, (with_it - without).tolist(), strict=True))
