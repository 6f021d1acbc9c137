"""What no packed row holds is scored one sequence a forward: exactly, and never without a word."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import Example, PackedBatch, check_engine, collate, score, score_with_stats
from alignkit.engine.fallback import hidden_alone
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule, SFTModule
from alignkit.modules.reference import frozen_copy
from tests.engine.families import LONGROPE, tiny_family
from tests.engine.test_families import EXAMPLES, plain_scores, tokens
from tests.engine.test_row import assert_same_gradients, gradients
from tests.modules.helpers import loader, logged_steps, sgd, trainer

SCORE_MODULE = sys.modules["alignkit.engine.score"]  # the package has a function of that name

# Recurrent and hybrid models, alibi and attention outside of the interface, a rotary embedding
# that depends on the longest sequence beside, a sparse choice of keys.
KINDS = [
    "mamba",
    "jamba",
    "lfm2",
    "qwen3_next",
    "bloom",
    "mpt",
    "falcon",
    "falcon+alibi",
    "gptj",
    "phi3+longrope",
    "deepseek_v32",
    "recurrent_gemma",  # under a soft-cap
]
TARGETS = {
    "mamba": ("in_proj",),
    "bloom": ("all-linear",),
    "lfm2": ("all-linear",),
}
SHORT = [Example(tokens(5, 1), [tokens(6, 2), tokens(3, 3)]), Example([], [tokens(7, 4)])]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of responses of each batch that was scored one sequence a forward."""
    counts: list[int] = []

    def counted(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        counts.append(batch.num_responses)
        return hidden_alone(model, batch)

    monkeypatch.setattr(SCORE_MODULE, "hidden_alone", counted)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_plain_forwards(kind: str, checkpointing: bool) -> None:
    """Each was refused."""
    model = tiny_family(kind)
    expected = plain_scores(model)
    expected_grads = gradients(expected, model)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            pytest.skip("transformers does not recompute this model's activations")
        # Its name until transformers 5.23, or since.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    check_engine(model)
    actual = score(model, collate(EXAMPLES))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6)
    assert_same_gradients(gradients(actual, model), expected_grads)


def test_statistics_come_in_the_same_order() -> None:
    model = tiny_family("mamba")
    batch = collate(EXAMPLES)
    with torch.no_grad():
        scores = score_with_stats(model, batch)
        one_by_one = [score_with_stats(model, batch.take([i])) for i in range(len(EXAMPLES))]
    for name in ("logps", "correct", "entropy"):
        expected = torch.cat([getattr(each, name) for each in one_by_one])
        torch.testing.assert_close(getattr(scores, name), expected)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_one_line_says_so_and_why(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where neither check nor score came first, and not again for a reference."""
    model = tiny_family(kind)
    with caplog.at_level(logging.INFO, "alignkit"), torch.no_grad():
        score(model, collate(EXAMPLES))
        score(frozen_copy(model), collate(EXAMPLES))
    lines = [r.getMessage() for r in caplog.records if "one sequence a forward" in r.getMessage()]
    assert len(lines) == 1
    assert type(model).__name__ in lines[0]
    reason = {"mamba": "scores are off by", "bloom": "AttentionInterface"}[kind]
    assert reason in lines[0]
    assert "\n" not in lines[0]


def test_what_fits_into_a_row_stays_in_one(forwards: list[int]) -> None:
    """Longrope with 16 original positions: rows that stay below are packed, longer ones are not."""
    model = tiny_family("phi3+longrope")
    check_engine(model)
    forwards.clear()
    with torch.no_grad():
        for examples, alone in ((SHORT, []), (EXAMPLES, [9])):
            expected = plain_scores(model, examples)
            torch.testing.assert_close(score(model, collate(examples)), expected, atol=1e-5, rtol=0)
            assert forwards == alone


def test_a_family_that_fits_is_never_scored_alone(forwards: list[int]) -> None:
    for kind in ("llama", "gemma2", "mistral"):
        model = tiny_family(kind)
        check_engine(model)
        score(model, collate(EXAMPLES))
    assert forwards == []


def test_a_length_too_long_to_try_at_first_is_tried_when_it_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("alignkit.engine.verify.CHECK_BUDGET", 1.0)
    changes = {
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 30},
        "original_max_position_embeddings": 30,
    }
    model = tiny_family("phi3", **changes)
    with caplog.at_level(logging.INFO, "alignkit"), torch.no_grad():
        check_engine(model)
        score(model, collate(SHORT))
        assert "one sequence a forward" not in caplog.text
        scores = score(model, collate(EXAMPLES))
    torch.testing.assert_close(scores, plain_scores(model), atol=1e-5, rtol=0)
    assert "more than 30 tokens" in caplog.text


# What is not right one sequence a forward either, with a word of the reason.
REFUSED = {
    "reformer": "differ from one forward to the next",
    "xlnet": "depend on those that follow",
    "bert-encoder": "depend on those that follow",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_even_this_does_not_score_is_refused_in_one_line(kind: str) -> None:
    model = tiny_family(kind)
    with pytest.raises(AlignkitError, match=REFUSED[kind]) as caught, torch.no_grad():
        score(model, collate(EXAMPLES))
    assert type(model).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_fallback_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scorers = SCORE_MODULE._SCORERS
    wrong = replace(scorers, alone=lambda model, batch: scorers.alone(model, batch) * 1.5)
    monkeypatch.setattr(SCORE_MODULE, "_SCORERS", wrong)
    with pytest.raises(AlignkitError, match="one sequence a forward scores are off"):
        check_engine(tiny_family("mamba"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_packing_require_refuses_it(kind: str, dtype: Any, tmp_path: Path) -> None:
    tiny_family(kind).save_pretrained(tmp_path)
    with pytest.raises(AlignkitError, match=r"^model\.packing=require: \w+ForCausalLM") as caught:
        SFTModule(
            str(tmp_path), lora=LoRAConfig(targets=TARGETS[kind]), dtype=dtype, packing="require"
        )
    assert "\n" not in str(caught.value)


def test_its_blocks_are_not_compiled(tmp_path: Path) -> None:
    tiny_family("mamba").save_pretrained(tmp_path)
    with pytest.raises(AlignkitError, match=r"^model\.compile: MambaForCausalLM"):
        SFTModule(str(tmp_path), lora=LoRAConfig(targets=TARGETS["mamba"]), compile=True)


@pytest.mark.parametrize("kind", ["mamba", "bloom", "lfm2"])
def test_sft_and_dpo_steps(kind: str, tmp_path: Path) -> None:
    """With adapters: SFT's steps are those of a plain loop, DPO begins at ln 2."""
    tiny_family(kind).save_pretrained(tmp_path / "base")
    examples = [
        Example(tokens(4 + i, i), [tokens(7 - i, i + 1), tokens(3 + i, i + 2)]) for i in range(4)
    ]
    answers = [Example(e.prompt, e.responses[:1]) for e in examples]
    options: dict[str, Any] = {
        "lora": LoRAConfig(targets=TARGETS[kind], r=4),
        "optimizer": sgd,
        "schedule": "constant_with_warmup",
    }
    torch.manual_seed(0)
    module = SFTModule(str(tmp_path / "base"), **options)
    logged = logged_steps(module)
    torch.manual_seed(0)
    plain = SFTModule(str(tmp_path / "base"), **options).model
    trainer(tmp_path, max_steps=2).fit(module, loader(answers, 2))
    trained = [p for p in plain.parameters() if p.requires_grad]
    for step, window in enumerate((answers[:2], answers[2:])):
        loss = -plain_scores(plain, window).mean()
        assert logged["train/loss"][step] == pytest.approx(loss.item(), abs=1e-5)
        for parameter, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= 0.1 * grad
    after = [p for p in module.model.parameters() if p.requires_grad]
    for ours, theirs in zip(after, trained, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    preference = DPOModule(str(tmp_path / "base"), **options)
    logged = logged_steps(preference)
    trainer(tmp_path, max_steps=2).fit(preference, loader(examples, 2))
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/loss"][1] != pytest.approx(math.log(2), abs=1e-6)
