"""What packed rows cannot score rightly is refused in one line, before a wrong score leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import Example, check_engine, collate, score
from alignkit.engine.attention import make_plan
from alignkit.engine.fp32 import in_fp32
from alignkit.engine.head import PLAIN, Curve
from alignkit.engine.interface import packed_attention_forward
from alignkit.engine.lengths import named_lengths
from alignkit.engine.row import PackedRow
from alignkit.engine.tail import _CURVE
from alignkit.engine.tiles import TiledAttention
from alignkit.engine.verify import set_packing
from alignkit.errors import AlignkitError
from alignkit.modules import SFTModule
from tests.engine.families import LONGROPE, tiny_family

SHORT = Example([1, 2, 3], [[4, 5], [6, 7, 8]])
LONG = Example(list(range(10, 30)), [list(range(30, 60))])


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def refusal(model: PreTrainedModel, example: Example | None = None) -> str:
    """The one line that check_engine, or a score without it, ends in where rows are required."""
    set_packing(model, "require")
    with pytest.raises(AlignkitError) as caught, torch.no_grad():
        score(model, collate([SHORT, example])) if example else check_engine(model, "require")
    assert "\n" not in str(caught.value)
    return str(caught.value)


LONGROPE_30 = {
    "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 30},
    "original_max_position_embeddings": 30,
}
# Each passed before with scores off by nats: 24 tokens were tried, and these begin to differ later.
BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", LONGROPE_30),
    "sparse attention": ("deepseek_v32", {"index_topk": 30}),
}


@pytest.mark.parametrize("spread", [0.0, 0.15])
@pytest.mark.parametrize("kind", BEYOND)
def test_what_differs_beyond_a_length_is_refused(kind: str, spread: float) -> None:
    family, changes = BEYOND[kind]
    refusal(tiny_family(family, spread, **changes))
    refusal(tiny_family(family, spread, **changes), LONG)


@pytest.mark.parametrize("cheap", [True, False])
def test_a_length_too_long_to_try_now_is_tried_when_a_sequence_reaches_it(
    cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences below it are scored; the refusal names the length to keep to."""
    monkeypatch.setattr("alignkit.engine.verify.CHECK_BUDGET", 2e11 if cheap else 1.0)
    model = tiny_family("phi3", **LONGROPE_30)
    if cheap:
        refusal(model)
        return
    check_engine(model)
    score(model, collate([SHORT, SHORT]))
    assert "lower data.max_length to 30" in refusal(model, LONG)
    right = tiny_family("llama+yarn")
    check_engine(right)
    score(right, collate([SHORT, LONG]))


def test_lengths_are_read_under_any_name_and_sizes_are_not() -> None:
    assert named_lengths(tiny_family("llama")) == []
    assert named_lengths(tiny_family("gpt2")) == []
    assert named_lengths(tiny_family("llama+yarn"))[-1] == 16
    model = tiny_family("llama")
    model.config.some_future_reach = 40
    model.config.nested = {"a_window": [20, 50]}
    model.config.tail_size = 4096  # beyond the model's positions: no row gets there
    assert named_lengths(model) == [20, 40, 50]


def test_a_soft_cap_is_noticed_before_logits_grow_into_it() -> None:
    """At initialisation logits of 0.1 pass a cap of 15 unchanged: the head is not plain."""
    model = tiny_family("nanochat", spread=0.0)
    check_engine(model)
    setattr(model, _CURVE, PLAIN)
    refusal(model)


@pytest.mark.parametrize(
    "kind", ["mamba", "jamba", "bamba", "falcon_h1", "xlstm", "bloom", "qwen4_exp_text"]
)
def test_architectures_that_rows_break_end_in_one_line(kind: str) -> None:
    """Each was a traceback from inside transformers, or neighbours' tokens in the state."""
    model = tiny_family(kind)
    assert type(model).__name__ in refusal(model)


def test_the_command_refuses_them_in_one_line(tmp_path: Path) -> None:
    tiny_family("mamba").save_pretrained(tmp_path)
    with pytest.raises(AlignkitError, match="MambaForCausalLM"):
        SFTModule(str(tmp_path), lora=None, packing="require")


def test_an_unknown_keyword_of_attention_is_refused_by_name() -> None:
    spans, cpu = collate([SHORT]).spans, torch.device("cpu")
    mask = PackedRow(spans, cpu, torch.float32, make_plan(spans, cpu, torch.float32)).mask({})
    module, q = torch.nn.Module(), torch.randn(1, 2, 8, 4)
    positions = torch.arange(8)[None]
    for known in ({"position_ids": positions}, {"anything": None}, {"use_cache": False}):
        packed_attention_forward(module, q, q, q, mask, **known)
    for name, value in {
        "some_future_bias": torch.zeros(1),
        "is_causal": False,
        "use_cache": True,
        "indices": torch.zeros(1),
    }.items():
        with pytest.raises(AlignkitError, match=name):
            packed_attention_forward(module, q, q, q, mask, **{name: value})
    with pytest.raises(AlignkitError, match="other tokens"):
        packed_attention_forward(module, q, q[:, :, :5], q[:, :, :5], mask)


def test_an_untested_family_is_proved_before_its_first_score() -> None:
    assert "JambaForCausalLM" in refusal(tiny_family("jamba"), LONG)


def _scaled_tiles(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    attend = TiledAttention.__call__

    def scaled(self: TiledAttention, *args: Any) -> Tensor:
        return attend(self, *args) * factor

    monkeypatch.setattr(TiledAttention, "__call__", scaled)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.1, False)])
def test_in_bf16_rounding_is_the_yardstick(
    tiny_model: Callable[..., PreTrainedModel],
    family: str,
    factor: float,
    passes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel of half precision that is off by a tenth: less than 0.5 nats a token."""
    _scaled_tiles(monkeypatch, factor)
    model = tiny_model(family).to(torch.bfloat16)
    if passes:
        check_engine(model)
    else:
        assert "bfloat16" in refusal(model)


def test_in_bf16_a_wrong_scale_shows_in_fp32(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """Logits 2 % too large, which is 0.1 nats a token and within the old tolerance."""
    model = tiny_model(family).to(torch.bfloat16).requires_grad_(False)
    setattr(model, _CURVE, Curve(scale=1.02))
    assert "nats" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_leaves_the_model_as_it_was(
    tiny_model: Callable[..., PreTrainedModel], family: str, dtype: torch.dtype
) -> None:
    """Modes of single modules, parameters, buffers, hooks, the random state and the settings."""
    model = tiny_model(family).to(dtype).train()
    list(model.modules())[-1].eval()
    tensors = [*model.parameters(), *model.buffers()]
    modes = [module.training for module in model.modules()]
    random, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    check_engine(model)
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert {t.dtype for t in model.parameters()} == {dtype}
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.get_float32_matmul_precision() == precision


def test_fp32_for_a_moment_is_fp32_and_holds_one_block_at_a_time(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """Equal to a model that was converted as a whole, though never a second model exists."""
    model = tiny_model(family).to(torch.bfloat16)
    ids = torch.tensor([[1, 2, 3, 4]])
    blocks = [m for m in model.modules() if "Layer" in type(m).__name__ or "Block" in str(type(m))]
    half: list[int] = []

    def count(*_: object) -> None:
        half.append(sum(p.dtype == torch.bfloat16 for b in blocks for p in b.parameters()))

    handles = [block.register_forward_hook(count) for block in blocks]
    with torch.no_grad(), in_fp32(model, model.device):
        actual = model(ids).logits
    for handle in handles:
        handle.remove()
    assert min(half) > 0
    with torch.no_grad():
        assert torch.equal(actual, model.float()(ids).logits)


def test_fp32_for_a_moment_ends_with_an_error_in_between(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(IndexError), torch.no_grad(), in_fp32(model, model.device):
        model(torch.tensor([[9999]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
