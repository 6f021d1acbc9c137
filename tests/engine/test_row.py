"""A model's own masks, restricted to the segments of a row: values, gradients, recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from alignkit.engine import Example, check_engine, collate, compile_blocks, score
from alignkit.engine.attention import make_plan
from alignkit.engine.row import PackedRow, layer_attention, mask_function, row_in_flight
from alignkit.engine.segments import DenseAttention, SegmentAttention, Window
from tests.engine.families import tiny_family
from tests.engine.test_families import EXAMPLES, plain_scores

CPU = torch.device("cpu")
SPANS = collate(EXAMPLES).spans

# One of each way to attend: windows in some layers, in all, in the mask alone, chunks without
# positions, sinks, soft-caps, and layers that drop keyword arguments.
KINDS = [
    "gemma3_text",
    "mistral",
    "phimoe+window",
    "llama4",
    "gpt_oss",
    "gemma2+softcap",
    "stablelm",
    "nemotron",
]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def gradients(scores: Tensor, model: PreTrainedModel) -> list[Tensor]:
    """Of a weighted sum, over every parameter that a score reaches."""
    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    grads = torch.autograd.grad(scores @ weights, parameters, allow_unused=True)
    return [torch.zeros(1) if grad is None else grad for grad in grads]


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_plain_forwards(kind: str, checkpointing: bool) -> None:
    """Also where a block's activations are computed again, long after the row has left."""
    model = tiny_family(kind)
    check_engine(model)
    expected = plain_scores(model)
    expected_grads = gradients(expected, model)
    if checkpointing:
        # Its name until transformers 5.23, or since.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    actual = score(model, collate(EXAMPLES))
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=0)
    assert_same_gradients(gradients(actual, model), expected_grads)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_untouched(kind: str) -> None:
    """After scoring, generation with left padding gives what a model never scored with gives."""
    model, fresh = tiny_family(kind), tiny_family(kind)
    score(model, collate(EXAMPLES))
    rows = torch.tensor([[0, 0, 0, *range(20, 35)], list(range(40, 58))])
    arguments = {
        "attention_mask": (rows != 0).long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(rows, **arguments), fresh.generate(rows, **arguments))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)
@pytest.mark.parametrize("kind", ["mistral", "stablelm"])
def test_compiled_blocks_give_the_same(kind: str) -> None:
    """Dynamo passes a block's mask on as the object that it is."""
    torch.compiler.reset()
    model = tiny_family(kind)
    batch = collate(EXAMPLES)
    expected = score(model, batch)
    expected_grads = gradients(expected, model)
    compile_blocks(model)
    actual = score(model, batch)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=0)
    assert_same_gradients(gradients(actual, model), expected_grads)
    torch.compiler.reset()


def test_a_window_longer_than_any_sequence_costs_nothing() -> None:
    """The same plan as without one: no mask, no second layout."""
    row = PackedRow(SPANS, CPU, torch.float32, make_plan(SPANS, CPU, torch.float32))
    for window, reach in ((37, None), (36, Window(36)), (6, Window(6))):
        function = sliding_window_causal_mask_function(window)
        layer = layer_attention(row.mask({"mask_function": function}))
        assert layer is not None
        assert layer.reach == reach
        assert (layer.plan is row.plan) is (reach is None)


def test_what_is_no_window_is_a_table() -> None:
    """Chunks of 4: a token sees its chunk, in positions of its sequence and not of the row."""
    spans = collate([Example([1, 2, 3], [[4, 5, 6], [7, 8]])]).spans
    row = PackedRow(spans, CPU, torch.float32, make_plan(spans, CPU, torch.float32))
    function = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    layer = layer_attention(row.mask({"mask_function": function}))
    assert layer is not None
    plan = layer.plan
    assert isinstance(plan, SegmentAttention)
    mask = plan.masks[0]
    assert mask is not None
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],  # position 3, the last of the first chunk
        [0, 0, 0, 0, 1, 0, 0, 0],  # position 4 begins the second
        [0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],  # the sibling's first token, again position 3
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_masks_without_a_row_are_those_of_transformers() -> None:
    calls: list[dict[str, object]] = []
    make = mask_function(lambda **given: calls.append(given))
    make(q_length=3)
    assert calls == [{"q_length": 3}]
    row = PackedRow(SPANS, CPU, torch.float32, DenseAttention(SPANS, CPU))
    with row_in_flight(row):
        assert layer_attention(make(q_length=3)) is not None
    make(q_length=4)
    assert len(calls) == 2
