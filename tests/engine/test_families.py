"""Every causal language model of transformers: scored exactly, or refused in one line.

``docs/models.md`` says which; `tests.engine.table` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import Example
from tests.engine.families import KINDS, UNBUILT
from tests.engine.table import DOCUMENT, TOLERANCE, UNTRIED, WAYS, listed, outcome


def tokens(count: int, seed: int) -> list[int]:
    return [10 + (17 * i * i + seed * i + 5) % 100 for i in range(count)]


# Sequences shorter and longer than the windows of 6 and the 16 positions of the tiny models, side
# by side, and responses that begin before a window's end and end after it.
EXAMPLES = [
    Example(tokens(9, 3), [tokens(5, 4), tokens(13, 5)]),
    Example([], [tokens(3, 6)]),
    Example(tokens(2, 1), [tokens(2, 7), tokens(1, 8), tokens(4, 2)]),
    Example(tokens(15, 9), [tokens(22, 1)]),
    Example([], [tokens(11, 2), tokens(30, 3)]),
]


pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore"),
]


def plain_scores(model: PreTrainedModel, examples: Sequence[Example] = EXAMPLES) -> Tensor:
    """Score every response in a forward of its own, with transformers' attention."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    scores = []
    for example in examples:
        for response in example.responses:
            row = torch.tensor([[*example.prompt, *response]])
            logp_LV = model(row, use_cache=False).logits[0].log_softmax(-1)
            first = max(len(example.prompt), 1)
            scores.append(logp_LV[first - 1 : -1].gather(1, row[0, first:, None])[:, 0])
    return torch.cat(scores)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_exact_or_refused(kind: str) -> None:
    """To 1e-4 nats a token in fp32; no third outcome, and none that is worse than documented."""
    found = outcome(kind)
    assert found.error is None or found.error <= TOLERANCE
    if f"transformers {transformers.__version__}:" not in DOCUMENT.read_text():
        return  # another version may do otherwise, exactly
    known = listed().get(kind, UNTRIED)
    assert WAYS.index(found.way) <= WAYS.index(known), found.reason


def test_no_type_is_missing_from_the_document() -> None:
    assert set(listed()) >= {*KINDS, *UNBUILT}
