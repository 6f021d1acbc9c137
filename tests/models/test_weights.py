"""A base whose blocks stay in their files is the one that is read whole, and holds no block."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignkit.batch import Example, collate
from alignkit.engine import check_engine, score
from alignkit.engine.fp32 import outermost_blocks
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.lora.identity import trained_fingerprint
from alignkit.models.dropout import zero_dropout
from alignkit.models.fingerprint import base_identity
from alignkit.models.load import load_model
from alignkit.models.noise import refuse_noise
from alignkit.models.policy import build_policy
from alignkit.models.weights import deferred_blocks
from alignkit.modules.reference import frozen_copy
from alignkit.utils.deferred import DeferredParameter, hold
from tests.architectures import built, tiny
from tests.conftest import tiny_config

OPTIONS = {"dtype": "float32", "random_init": False, "dropout": False}
BATCH = collate([Example([5, 6, 7], [[8, 9], [10, 11, 12]]), Example([], [[3, 4, 5, 6]])])


def both(base: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    whole = load_model(str(base), dtype=dtype)
    with deferred_blocks():
        return whole, load_model(str(base), dtype=dtype)


def in_blocks(model: nn.Module) -> list[nn.Parameter]:
    return [p for block in outermost_blocks(model) for p in block.parameters()]


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    """The same values, dtypes and ties under the same names, buffers that no file has included."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, other))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value, theirs[name]), name
        for one, two in itertools.combinations(mine, 2):
            assert (mine[one] is mine[two]) == (theirs[one] is theirs[two]), (one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deferred_base_is_the_whole_one(
    family: str, dtype: torch.dtype, model_dir: Callable[..., Path]
) -> None:
    whole, deferred = both(model_dir(family), dtype)
    assert in_blocks(deferred)
    assert all(isinstance(p, DeferredParameter) and p.is_meta for p in in_blocks(deferred))
    assert not any(p.is_meta for p in deferred.get_output_embeddings().parameters())
    assert base_identity(deferred) == base_identity(whole)
    for model in (whole, deferred):  # scored block by block, in fp32 copies too
        zero_dropout(model)
        check_engine(model)
        refuse_noise(model)
    with torch.no_grad():
        assert torch.equal(score(deferred, BATCH), score(whole, BATCH))
    assert all(p.is_meta for p in in_blocks(deferred))
    hold(deferred)
    assert_equal(deferred, whole)
    assert [type(block) for block in outermost_blocks(deferred)] == [
        type(block) for block in outermost_blocks(whole)
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "gpt_neo", "opt", "olmo2", "phi"])
def test_names_ties_and_buffers_are_transformers_own(
    kind: str, tied: bool, tmp_path: Path, quiet_transformers: None
) -> None:
    config = tiny(kind)
    config.tie_word_embeddings = tied
    built(config).save_pretrained(tmp_path, max_shard_size="20KB")
    whole, deferred = both(tmp_path)
    assert all(p.is_meta for p in in_blocks(deferred))
    assert base_identity(deferred) == base_identity(whole)
    hold(deferred)
    assert_equal(deferred, whole)


def test_a_file_of_the_backbone_alone_is_read_under_its_names(tmp_path: Path) -> None:
    """The Hub's GPT-2 has no prefix before its blocks' names."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("gpt2")).transformer.save_pretrained(tmp_path)
    whole, deferred = both(tmp_path)
    assert all(p.is_meta for p in in_blocks(deferred))
    hold(deferred)
    assert_equal(deferred, whole)


def test_converted_weights_are_read_whole_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quiet_transformers: None
) -> None:
    """Mixtral's experts lie one by one in its files and as one tensor in its model."""
    built(tiny("mixtral")).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "alignkit.models.weights"):
        whole, deferred = both(tmp_path)
    assert_equal(deferred, whole)
    assert "held whole by each process" in caplog.text


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(r=2),
        LoRAConfig(r=2, use_dora=True, bias="all"),
        LoRAConfig(r=2, init="pissa"),
        LoRAConfig(r=2, init="orthogonal", modules_to_save=("lm_head",)),
        None,
    ],
    ids=["gaussian", "dora", "pissa", "orthogonal", "full"],
)
def test_a_policy_and_its_reference_start_as_whole_ones_do(
    lora: LoRAConfig | None, model_dir: Callable[..., Path]
) -> None:
    base = str(model_dir("llama"))
    made = []
    for wanted in (False, True):
        torch.manual_seed(3)
        with deferred_blocks(wanted):
            policy, identity, _ = build_policy(base, lora, **OPTIONS)
        reference = frozen_copy(policy)
        made.append((policy, reference, identity, trained_fingerprint(reference)))
    (whole, copied, *names), (policy, reference, *own_names) = made
    assert own_names == names
    hold(policy, reference)
    assert_equal(policy, whole)
    assert_equal(reference, copied)
    shared = [
        [mine is theirs for mine, theirs in zip(a.parameters(), b.parameters(), strict=True)]
        for a, b in ((whole, copied), (policy, reference))
    ]
    assert shared[0] == shared[1]
    assert [p.requires_grad for p in policy.parameters()] == [
        p.requires_grad for p in whole.parameters()
    ]


def test_a_gradient_is_that_of_the_whole_model(model_dir: Callable[..., Path]) -> None:
    whole, deferred = both(model_dir("llama"))
    for model in (whole, deferred):
        score(model, BATCH).sum().backward()
    for mine, theirs in zip(deferred.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_value_is_rounded_as_that_of_a_model_that_was_cast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    whole, deferred = both(tmp_path, torch.bfloat16)
    nn.Module.to(whole, torch.float16)
    nn.Module.to(deferred, torch.float16)
    hold(deferred)
    assert_equal(deferred, whole)


def test_a_block_s_weight_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    model.save_pretrained(tmp_path)
    with deferred_blocks(), pytest.raises(AlignkitError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path))
