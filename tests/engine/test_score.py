"""Packed scoring against a plain forward, one sequence at a time, in fp32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import (
    Example,
    check_engine,
    collate,
    response_lengths,
    response_means,
    response_sums,
    score,
    score_with_stats,
)
from alignkit.errors import AlignkitError

EXAMPLES = [
    Example([5, 6, 7, 8, 9], [[10, 11, 12], [13, 14, 15, 16, 0]]),
    Example([], [[20, 21, 22, 23]]),
    Example([30, 31], [[32, 33, 0], [34, 0], [35, 36, 37, 38, 39, 0]]),
    Example([40], [[41, 42, 43, 44]]),
    Example([], [[50, 51, 52], [53, 54]]),
    Example([60, 61, 62], [[63]]),
]


def plain_scores(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """Score every response in a forward of its own, over the whole vocabulary."""
    scores = []
    for example in examples:
        for k, response in enumerate(example.responses):
            row = torch.tensor([[*example.prompt, *response]])
            model.set_attn_implementation("eager")
            logp_LV = model(row).logits[0].log_softmax(-1)
            for j, token in enumerate(response):
                position = len(example.prompt) + j
                if position and (example.scored is None or example.scored[k][j]):
                    scores.append(logp_LV[position - 1, token])
    return torch.stack(scores)


def train_all(model: PreTrainedModel, head: bool) -> list[torch.nn.Parameter]:
    """Make everything trainable but the embeddings, whose tie would train the head too."""
    tied = {id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        parameter.requires_grad_(head or id(parameter) not in tied)
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("head", [False, True], ids=["frozen-head", "trained-head"])
def test_values_and_gradients_equal_plain_forward(
    tiny_model: Callable[..., PreTrainedModel], family: str, head: bool
) -> None:
    model = tiny_model(family)
    parameters = train_all(model, head)
    batch = collate(EXAMPLES)
    weights = torch.randn(batch.num_scored, generator=torch.Generator().manual_seed(1))

    expected = plain_scores(model, EXAMPLES)
    expected_grads = torch.autograd.grad(expected @ weights, parameters)
    actual = score(model, batch)
    actual_grads = torch.autograd.grad(actual @ weights, parameters)

    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        scale = expected_grad.abs().max().clamp(min=1)
        torch.testing.assert_close(actual_grad / scale, expected_grad / scale, atol=1e-5, rtol=0)


tokens = st.integers(0, 383)
responses = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4)
examples = st.builds(Example, st.lists(tokens, max_size=12), responses)


@settings(max_examples=25, deadline=None)
@given(st.lists(examples, min_size=1, max_size=4))
def test_any_shape_of_batch(drawn: list[Example]) -> None:
    """Empty prompts, one-token responses, any k: the same scores as one at a time."""
    model = test_any_shape_of_batch.model  # type: ignore[attr-defined]
    batch = collate(drawn)
    if batch.num_scored == 0:
        return
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, batch), plain_scores(model, drawn), atol=1e-5, rtol=1e-5
        )


@pytest.fixture(autouse=True)
def _model_for_hypothesis(tiny_model: Callable[..., PreTrainedModel]) -> None:
    test_any_shape_of_batch.model = tiny_model("llama")  # type: ignore[attr-defined]


def test_siblings_and_neighbours_do_not_leak(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """Changing one response changes its own scores and no other's, to the last bit."""
    model = tiny_model(family)
    changed = copy.deepcopy(EXAMPLES)
    changed[0].responses[1][2] = 99
    batch, other = collate(EXAMPLES), collate(changed)
    with torch.no_grad():
        differs = score(model, batch) != score(model, other)
    assert differs.any()
    assert set(batch.response_index[differs].tolist()) == {1}


def test_head_chunks(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that do not divide N change nothing, with either head."""
    model = tiny_model("gpt_neox")
    batch = collate(EXAMPLES)
    whole = score(model, batch)
    monkeypatch.setattr("alignkit.engine.head.CHUNK", 7)
    torch.testing.assert_close(score(model, batch), whole, atol=1e-6, rtol=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(score(model, batch), whole, atol=1e-6, rtol=0)


def test_statistics_against_softmax(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Correctness and entropy from the whole distribution of a plain forward."""
    model = tiny_model("gpt2")
    ids = [5, 6, 7, 8, 9, 10]
    scores = score_with_stats(model, collate([Example(ids[:2], [ids[2:]])]))
    model.set_attn_implementation("eager")
    probability = model(torch.tensor([ids])).logits[0, 1:-1].softmax(-1)
    assert scores.correct is not None and scores.entropy is not None
    assert torch.equal(scores.correct, probability.argmax(-1) == torch.tensor(ids[2:]))
    expected = torch.distributions.Categorical(probability).entropy()
    torch.testing.assert_close(scores.entropy, expected.detach(), atol=1e-5, rtol=1e-5)


def test_reductions_by_hand() -> None:
    """Responses of 2, 1 and 3 scored tokens: sums 1+2, 4, 8+16+32; means by their lengths."""
    batch = collate([Example([1], [[2, 3], [4]]), Example([1], [[5, 6, 7]])])
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert response_sums(logps, batch).tolist() == [3.0, 4.0, 56.0]
    assert response_lengths(batch).tolist() == [2, 1, 3]
    torch.testing.assert_close(response_means(logps, batch), torch.tensor([1.5, 4.0, 56 / 3]))


def test_scored_mask_selects_tokens(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    masked = Example([1, 2], [[3, 4, 5, 6]], scored=[[True, False, False, True]])
    batch = collate([masked])
    assert batch.target_ids.tolist() == [3, 6]
    assert batch.score_from.tolist() == [1, 4]
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, batch), plain_scores(model, [masked]), atol=1e-5, rtol=1e-5
        )


def test_bf16_stays_near_fp32(tiny_model: Callable[..., PreTrainedModel], family: str) -> None:
    """The bf16 engine is no further from the fp32 truth than a plain bf16 forward, up to noise."""
    model = tiny_model(family)
    with torch.no_grad():
        truth = plain_scores(model, EXAMPLES)
        model.to(torch.bfloat16)
        plain = plain_scores(model, EXAMPLES).float()
        packed = score(model, collate(EXAMPLES))
    assert (packed - truth).abs().mean() <= 1.5 * (plain - truth).abs().mean() + 1e-3


def test_generation_is_untouched(tiny_model: Callable[..., PreTrainedModel], family: str) -> None:
    """After scoring, generation with left padding gives what a model never scored with gives."""
    model, fresh = tiny_model(family), tiny_model(family)
    score(model, collate(EXAMPLES))
    rows = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    arguments = {
        "attention_mask": (rows != 0).long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(rows, **arguments), fresh.generate(rows, **arguments))


def test_check_engine_accepts_the_families(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    check_engine(tiny_model(family))


def test_more_tokens_than_positions_is_one_line(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    with pytest.raises(AlignkitError, match=r"600 tokens exceeds the model's 512 positions"):
        score(tiny_model(family), collate([Example([1] * 300, [[2], [3] * 300])]))


def test_the_sums_of_responses_do_not_depend_on_the_order_of_addition() -> None:
    """A GPU adds in any order; in fp32 that moved DPO's first loss away from ln 2."""
    batch = collate([Example([1], [[2] * 700, [3] * 400]), Example([], [[4] * 900])])
    torch.manual_seed(0)
    logps_N = -5 * torch.rand(len(batch.response_index))
    sums_R = response_sums(logps_N, batch)
    parts = [logps_N[batch.response_index == r].tolist() for r in range(batch.num_responses)]
    assert sums_R.tolist() == torch.tensor([math.fsum(part) for part in parts]).tolist()
    assert sums_R.dtype == torch.float32
