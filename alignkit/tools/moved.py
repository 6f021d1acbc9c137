"""Measure where an adapter moved a model: each token's log-probability with and without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.batch import Example, collate
from alignkit.engine import score
from alignkit.lora import adapter_configs, adapters_disabled
from alignkit.models.text_format import TextFormat
from alignkit.tools.generate.pieces import UNFINISHED
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
    pieces = _pieces([str(tokenizer.decode(list(ids[:end]))) for end in range(1, len(ids) + 1)])
    if not ids or not adapter_configs(model):
        return [(piece, None) for piece in pieces]
    (prompt,) = encode_prompts([question], asked, tokenizer)
    batch = collate([Example(prompt=prompt, responses=[list(ids)])]).to(model.device)
    with_it = score(model, batch)
    with adapters_disabled(model):
        without = score(model, batch)
    return list(zip(pieces, (with_it - without).tolist(), strict=True))


def _pieces(texts: Sequence[str]) -> list[str]:
    """Return what each token adds to a growing text.

    The tokens of a character that several of them spell add nothing until the last one.
    """
    pieces, shown = [], ""
    for index, text in enumerate(texts):
        last = index == len(texts) - 1
        grown = text if last or not text.endswith(UNFINISHED) else shown
        pieces.append(grown[len(shown) :])
        shown = grown
    return pieces
