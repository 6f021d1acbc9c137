"""Adapters on every causal language model of transformers: exact, and what is left out is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, LoRALinear, adapters_disabled, inject_lora, merge_lora
from alignkit.lora.adapter import adapter_layers
from alignkit.lora.kinds import is_linear
from alignkit.models.export import export
from tests.engine.families import KINDS, VARIANTS, tiny_family
from tests.engine.table import REFUSED, UNTRIED, listed
from tests.lora.travel import IDS, RELOADED, travel

# One of each kind: a subclass of Linear whose output is added to in place, routers that are linear
# layers and that are not, raw experts, a gate of one expert, a vision tower, recurrent mixers that
# read weights, fused projections, queries scaled in place.
SOME = {
    "afmoe": "mlp.router.gate",
    "bloom": "",
    "dbrx": "ffn.router.layer",
    "falcon": "",
    "gemma3": "model.vision_tower",
    "gpt_bigcode": "",
    "gpt_oss": "mlp.experts.gate_up_proj",
    "jamba": "mamba.dt_proj",
    "llama4_text": "feed_forward.router",
    "mamba": "mixer.out_proj",
    "phi3": "",
    "qwen2_moe": "mlp.shared_expert_gate",
}
SCORED = [kind for kind in KINDS if listed().get(kind) not in (REFUSED, UNTRIED)]
DENSE_AND_EXPERTS = "as other modules of the architecture"


pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("kind", SOME)
def test_adapters_train_exactly_and_travel(kind: str, tmp_path: Path) -> None:
    """Gradients are those of the merged weights, and both exports answer as the model does."""
    found = travel(kind, tmp_path)
    assert found.wrong == ()
    assert SOME[kind] in found.left_out
    assert bool(SOME[kind]) == bool(found.left_out)
    assert found.merged == RELOADED
    refused = kind in ("afmoe", "qwen2_moe")  # whose dense layers PEFT takes for experts
    assert DENSE_AND_EXPERTS in found.peft if refused else found.peft == RELOADED


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in SCORED if k not in {*VARIANTS, *SOME}])
def test_every_other_family_too(kind: str, tmp_path: Path) -> None:
    found = travel(kind, tmp_path)
    assert found.wrong == ()
    for way in (found.targets, found.peft, found.merged):
        assert way and "\n" not in way


def test_what_a_mixer_reads_is_adapted_where_it_is_named(tmp_path: Path) -> None:
    """Mamba's mixer takes the weights of three layers by hand, in training two more than PEFT."""
    found = travel("mamba", tmp_path, ("in_proj", "x_proj", "dt_proj", "out_proj"))
    assert found.wrong == ()
    assert found.merged == RELOADED
    assert "PEFT reads out_proj of mamba" in found.peft
    found = travel("mamba", tmp_path / "x", ("in_proj", "x_proj"))
    assert (found.peft, found.merged, found.wrong) == (RELOADED, RELOADED, ())
    found = travel("jamba", tmp_path / "j", ("in_proj", "dt_proj"))
    assert "JambaForCausalLM reads the weights of dt_proj itself" in found.peft
    assert not (tmp_path / "j" / "peft").exists()
    assert (found.merged, found.wrong) == (RELOADED, ())


def test_what_is_left_out_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_family("qwen3_moe")
    with caplog.at_level(logging.WARNING):
        inject_lora(model, LoRAConfig(targets="all-linear"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "LoRA: all-linear leaves out mlp.experts.gate_up_proj, mlp.experts.down_proj (experts, "
        "kept as raw parameters); mlp.gate (routers)"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        inject_lora(tiny_family("qwen3"), LoRAConfig(targets="all-linear"))
    assert not caplog.records  # nothing but embeddings, norms and the head


def test_a_router_is_adapted_where_it_is_asked_for() -> None:
    model = inject_lora(tiny_family("afmoe"), LoRAConfig(targets=("q_proj", "router.gate")))
    names = {path.rpartition(".")[2] for path in adapter_layers(model)}
    assert names == {"q_proj", "gate"}


@pytest.mark.parametrize(
    ("kind", "target", "told"),
    [
        ("qwen3_moe", "mlp.gate", r"mlp\.gate is a Qwen3MoeTopKRouter"),
        ("qwen3_moe", "experts.down_proj", r"experts\.down_proj is a parameter of Qwen3MoeExperts"),
        ("jetmoe", "mlp.input_linear", "is a JetMoeParallelExperts"),
    ],
)
def test_a_target_that_is_no_layer_says_what_it_is(kind: str, target: str, told: str) -> None:
    with pytest.raises(AlignkitError, match=f"matches no module .*{told}"):
        inject_lora(tiny_family(kind), LoRAConfig(targets=target))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "dropout": 0.5},
        {"init": "pissa", "use_rslora": True},
        {"bias": "lora_only"},
    ],
)
def test_the_weight_that_is_read_is_the_one_in_effect(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(6, 5))
    plain = holder[0]
    model = inject_lora(holder, LoRAConfig(r=2, targets="0", **options)).eval()  # type: ignore[arg-type]
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    x = torch.randn(3, 6)

    def reads_right() -> None:
        torch.testing.assert_close(functional.linear(x, layer.weight, layer.bias), layer(x))

    reads_right()
    layer(x).square().sum().backward()
    called = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    model.zero_grad()
    functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    for name, grad in called.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, grad)
    merge_lora(model)
    reads_right()
    with adapters_disabled(model):
        reads_right()
        assert torch.equal(layer.weight, layer.original("weight"))
    assert layer.in_features == plain.in_features


def test_a_subclass_is_linear_if_it_computes_so() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return super().forward(input), None

    class Spelt(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            product = input @ self.weight.T
            return product if self.bias is None else product + self.bias

    assert is_linear(Spelt(4, 3)) and is_linear(Spelt(4, 3, bias=False))
    assert not is_linear(Doubled(4, 3)) and not is_linear(Pair(4, 3))
    model = inject_lora(nn.ModuleDict({"a": Spelt(4, 3), "b": Doubled(4, 3)}), LoRAConfig())
    assert list(adapter_layers(model)) == ["a"]


def test_merged_export_of_a_model_with_a_tower(tmp_path: Path) -> None:
    """Its tower goes along unchanged."""
    model = inject_lora(tiny_family("gemma3"), LoRAConfig(r=2))
    export(model, tmp_path, "merged")
    again = type(model).from_pretrained(tmp_path)
    tower = again.model.vision_tower.state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(tower[name], value)
    assert IDS.shape == (1, 12)
