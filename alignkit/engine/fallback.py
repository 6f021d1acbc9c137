"""One sequence a forward, for models and lengths that no packed row expresses.

Recurrent layers carry a neighbour's state along, some attention is outside of transformers'
interface, and some rotary embeddings depend on the longest sequence beside. A response goes through
such a model with its prompt alone, as transformers would score it: right, and slower by the number
of sequences in a row and the prompts that are computed again.

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
        model: Attends as it does by itself: no row is in flight.
        batch: On the model's device.

    Returns:
        [N, D] in the batch's order.
    """
    body = backbone(model)
    sequences = list(_sequences(batch))
    hidden_SD = torch.cat(
        [body(input_ids=ids_L[None], use_cache=False).last_hidden_state[0] for ids_L in sequences]
    )
    starts = [0, *accumulate(len(ids_L) for ids_L in sequences)][:-1]
    start_R = torch.tensor(starts, device=hidden_SD.device)
    # A token's position is its place in its sequence.
    place_N = batch.position_ids[batch.score_from]
    return hidden_SD[start_R[batch.response_index] + place_N]


def _sequences(batch: PackedBatch) -> Iterator[Tensor]:
    """Each response behind its prompt, [L] token ids, response by response."""
    for span in batch.spans:
        first = span.start + span.prompt
        prompt = batch.input_ids[span.start : first]
        for length in span.responses:
            yield torch.cat((prompt, batch.input_ids[first : first + length]))
            first += length
