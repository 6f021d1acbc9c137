"""Compute hidden states one sequence a forward, where packed rows would be scored wrongly.

Recurrent layers carry the state of one sequence into the next. Some attention does not go through
transformers' interface. Some rotary embeddings depend on the longest sequence of the row. A
response goes through such a model behind its prompt and with nothing else, as transformers would
score it. This takes longer: a row takes many forwards, and each response computes its prompt again.

Shape letters: N scored tokens, L tokens of a sequence, S tokens of all sequences, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine.interface import backbone


def hidden_alone(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute the hidden states that predict the scored tokens, one sequence a forward.

    Args:
        model: Any model. It attends in its own way, since no packed row is in flight.
        batch: On the model's device.

    Returns:
        [N, D], in the order of ``batch.target_ids``.
    """
    body = backbone(model)
    sequences = list(_sequences(batch))
    hidden_SD = torch.cat(
        [body(input_ids=ids_L[None], use_cache=False).last_hidden_state[0] for ids_L in sequences]
    )
    starts = [0, *accumulate(len(ids_L) for ids_L in sequences)][:-1]
    start_R = torch.tensor(starts, device=hidden_SD.device)
    # A position counts from the start of its own sequence.
    offset_N = batch.position_ids[batch.score_from]
    return hidden_SD[start_R[batch.response_index] + offset_N]


def _sequences(batch: PackedBatch) -> Iterator[Tensor]:
    """Yield each response behind its prompt, as [L] token ids."""
    for span in batch.spans:
        first = span.start + span.prompt
        prompt = batch.input_ids[span.start : first]
        for length in span.responses:
            yield torch.cat((prompt, batch.input_ids[first : first + length]))
            first += length
