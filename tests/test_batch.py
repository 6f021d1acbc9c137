"""The row's layout, by hand."""

from __future__ import annotations

import pickle

import pytest
import torch

from alignkit.engine import Example, Span, collate
from alignkit.errors import AlignkitError


def test_row_by_hand() -> None:
    """Prompt [1 2] with [3 4] and [5], then an empty prompt with [6 7].

    Token 3 is predicted from position 1 (the prompt's end), 4 from 3's own place 2, 5 from 1
    again; 6 has no predictor; 7 is predicted from 6 at row index 5.
    """
    batch = collate([Example([1, 2], [[3, 4], [5]]), Example([], [[6, 7]])])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert batch.score_from.tolist() == [1, 2, 1, 5]
    assert batch.target_ids.tolist() == [3, 4, 5, 7]
    assert batch.response_index.tolist() == [0, 0, 1, 2]
    assert batch.spans == (Span(0, 2, (2, 1)), Span(5, 0, (2,)))
    assert (batch.num_tokens, batch.num_scored) == (7, 4)
    assert (batch.num_examples, batch.num_responses) == (2, 3)


def test_moves_and_travels_between_processes() -> None:
    batch = collate([Example([1, 2], [[3, 4], [5]])])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta" and moved.spans == batch.spans
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.score_from, batch.score_from) and again.spans == batch.spans


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([Example([1], [])], "example 0 has no responses"),
        ([Example([1], [[2], []])], "response 1 is empty"),
        ([Example([1], [[2, 3]], scored=[[True]])], "scored mask has 1"),
    ],
)
def test_bad_examples_are_one_line(examples: list[Example], message: str) -> None:
    with pytest.raises(AlignkitError, match=message) as caught:
        collate(examples)
    assert "\n" not in str(caught.value)
