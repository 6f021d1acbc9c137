"""LoRA against the installed PEFT: forward, gradients and merge, for every target and variant.

Adapters travel through PEFT's own directory format in one direction here, so both sides hold the
same numbers: PEFT builds and moves an adapter, alignkit loads it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.lora import LoRAConfig, LoRALinear, load_adapter, merge_lora

peft = pytest.importorskip("peft")

# PEFT tells at length what it does with Conv1D, tied layers and adapted embeddings, and calls
# what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Make = Callable[..., PreTrainedModel]

IDS = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(0))

ATTENTION = {
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "llama": ["q_proj", "v_proj"],
}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in", "llama": "embed_tokens"}
HEAD = {"gpt2": "lm_head", "gpt_neox": "embed_out", "llama": "lm_head"}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True, "r": 6},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(attn|attention).*(proj|dense|query_key_value|c_attn)"},
    "layers": {"layers_to_transform": [1]},
    "layers pattern": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "patterns": {"rank_pattern": {r"1\..*": 3}, "alpha_pattern": {r".*\.0\..*": 5}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "use_dora": True},
    "modules_to_save": {"modules_to_save": ["mlp"]},
    "embedding": {"target_modules": "EMBEDDING"},
    "embedding dora": {"target_modules": "EMBEDDING", "use_dora": True},
    "head": {"target_modules": "HEAD"},
    "head dora": {"target_modules": "HEAD", "use_dora": True},
    "head saved": {"modules_to_save": "HEAD"},
}
# PEFT gives A and B the wrong shapes on GPT-2's Conv1D.
SKIPPED = {("olora", "gpt2")}


def build(model: PreTrainedModel, family: str, **options: Any) -> Any:
    """A PEFT model whose trainable parameters have been moved, in eval mode."""
    names = {"EMBEDDING": [EMBEDDING[family]], "HEAD": [HEAD[family]]}
    for key in ("target_modules", "modules_to_save"):
        value = options.get(key)
        if isinstance(value, str) and value in names:
            options[key] = names[value]
            if not any(path.endswith(names[value][0]) for path, _ in model.named_modules()):
                options[key] = ["lm_head"]
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ATTENTION[family]}
        | options
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def save(theirs: Any, path: Path) -> None:
    # "auto" adds whole embeddings to the file, see test_peft_travel.
    theirs.save_pretrained(path, save_embedding_layers=False)


def common_name(name: str) -> str:
    """One name for the same tensor on both sides: ``h.0.attn.c_attn.lora_A``."""
    for old, new in (
        ("base_model.model.", ""),
        (".base_layer.", "."),
        (".modules_to_save.default.", "."),
        (".adapters.default.", "."),
        ("lora_embedding_", "lora_"),
        ("lora_magnitude_vector", "magnitude"),
        (".default.weight", ""),
        (".default", ""),
    ):
        name = name.replace(old, new)
    return name


def gradients(model: nn.Module, transpose: bool) -> dict[str, Tensor]:
    """Gradients by common name, A and B as [I, R] and [R, O]."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = common_name(name).endswith(("lora_A", "lora_B"))
            assert parameter.grad is not None, name
            found[common_name(name)] = (
                parameter.grad.t() if transpose and matrix else parameter.grad
            )
    return found


@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_merge(
    tiny_model: Make, family: str, case: str, tmp_path: Path
) -> None:
    if (case, family) in SKIPPED:
        pytest.skip("PEFT's OLoRA does not fit Conv1D")
    theirs = build(tiny_model(family), family, **CASES[case])
    save(theirs, tmp_path)
    ours = load_adapter(tiny_model(family), tmp_path, untie=True)
    want = theirs(IDS).logits
    got = ours(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    mine, reference = gradients(ours, False), gradients(theirs, True)
    assert mine.keys() == reference.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6)

    # PEFT merges an adapted head or embedding into both sides of GPT-2's tie.
    if family != "gpt2" or not any(word in case for word in ("head", "embedding")):
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(
            merge_lora(ours)(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5
        )


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    i=st.integers(1, 12),
    o=st.integers(1, 12),
    r=st.integers(1, 6),
    alpha=st.floats(0.1, 32),
    conv=st.booleans(),
    dora=st.booleans(),
    rslora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_layer_of_any_shape(
    rows: list[int],
    i: int,
    o: int,
    r: int,
    alpha: float,
    conv: bool,
    dora: bool,
    rslora: bool,
    seed: int,
) -> None:
    """Output, gradients of x, A, B and m, and merged weight of a single layer."""
    torch.manual_seed(seed)
    base = Conv1D(o, i) if conv else nn.Linear(i, o)
    nn.init.normal_(base.weight)
    holder = nn.Sequential(copy.deepcopy(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, use_dora=dora, use_rslora=rslora, target_modules=["0"]
        )
        theirs = peft.get_peft_model(holder, config).base_model.model[0]
    ours = LoRALinear(base, LoRAConfig(r=r, alpha=alpha, use_dora=dora, use_rslora=rslora))
    adapter = ours.adapter("default")
    with torch.no_grad():
        a, b = torch.randn(i, r), torch.randn(r, o)
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
        theirs.lora_A["default"].weight.copy_(a.t())
        theirs.lora_B["default"].weight.copy_(b.t())
    x = torch.randn(*rows, i, requires_grad=True)
    y, want = ours(x), theirs(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(y)
    mine = torch.autograd.grad(y, (x, *adapter.parameters()), g)
    inner = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    inner += [theirs.lora_magnitude_vector["default"].weight] if dora else []
    dx, da, db, *dm = torch.autograd.grad(want, (x, *inner), g)
    reference = (dx, da.t(), db.t(), *dm)
    torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-3)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(base.weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-4)


def test_dropout_matches_draw_for_draw(tiny_model: Make, tmp_path: Path) -> None:
    """Same seed, same masks: dropout falls on the adapter's input, before A, with DoRA too."""
    for dora in (False, True):
        theirs = build(tiny_model("llama"), "llama", lora_dropout=0.4, use_dora=dora)
        save(theirs, tmp_path / str(dora))
        ours = load_adapter(tiny_model("llama"), tmp_path / str(dora))
        torch.manual_seed(5)
        want = theirs.train()(IDS).logits
        torch.manual_seed(5)
        torch.testing.assert_close(ours.train()(IDS).logits, want, rtol=1e-4, atol=1e-4)
