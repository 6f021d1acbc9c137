"""Stop an answer at a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


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
