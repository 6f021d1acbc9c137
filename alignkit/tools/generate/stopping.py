"""Stop an answer at a text, and find where it was stopped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


class StopText(StoppingCriteria):
    """Stop a row whose answer contains a text, which is searched in its last tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows are to stop, [B] bool."""
        # A token holds at least a byte, so the text of these tokens is at least as long as `stop`.
        start = max(self.width, input_ids.shape[1] - len(self.stop.encode()) - 1)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self.stop in tail for tail in tails], device=input_ids.device)


def stopping_at(
    tokenizer: PreTrainedTokenizerBase,
    stop: str | None,
    strings: str | list[str] | None,
    width: int,
) -> StoppingCriteriaList:
    """Return what stops an answer beside its end tokens.

    Args:
        tokenizer: The model's tokenizer.
        stop: A text that ends an answer.
        strings: The value of transformers' ``stop_strings``.
        width: Tokens of the padded prompts.
    """
    ours = [] if stop is None else [StopText(tokenizer, stop, width)]
    theirs = [] if strings is None else [StopStringCriteria(tokenizer, strings)]
    return StoppingCriteriaList([*ours, *theirs])


def drawn_tokens(
    row: Sequence[int], width: int, pad: int, eos: Collection[int], criteria: StoppingCriteriaList
) -> list[int]:
    """Return the tokens of an answer without the padding up to the end of the batch's longest.

    Where the padding is an end token, or is no end token at all, the tokens alone do not tell where
    the answer was stopped; the criteria that stopped it do.

    Args:
        row: The ids of prompt and answer.
        width: Tokens of the padded prompt.
        pad: The id of padding.
        eos: The ids of end tokens.
        criteria: What stops a row beside these.
    """
    answer = list(row[width:])
    if not answer or answer[-1] != pad:
        return answer
    for n, token in enumerate(answer, start=1):
        if token in eos or _holds(criteria, row[: width + n]):
            return answer[:n]
    return answer


def _holds(criteria: StoppingCriteriaList, ids: Sequence[int]) -> bool:
    scores: Any = None  # which none of these read
    return any(bool(each(torch.tensor([ids]), scores)) for each in criteria)
