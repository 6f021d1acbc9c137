"""A base in 4 and 8 bits: exact against PEFT's QLoRA, shared, named, resumed and merged."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from alignkit import DPOModule, SFTModule
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter, merge_lora
from alignkit.lora.adapter import adapter_layers
from alignkit.lora.inject import base_parameter_count
from alignkit.lora.kinds import QuantizedLinear
from alignkit.models.checkpoint import load_policy, trainable_state
from alignkit.models.export import export
from alignkit.models.fingerprint import base_fingerprint
from alignkit.models.load import load_model
from alignkit.models.quantize import NF4Linear, quantization, quantize, unquantize
from alignkit.tools.export import export as export_tool
from tests.modules.helpers import answers, loader, pairs, sgd, trainer

KINDS = ("nf4", "int8")
IDS = torch.arange(2, 34)[None]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install bitsandbytes",
)
ModelDir = Callable[[str], Path]


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits[0, :-1].float()
    return functional.cross_entropy(logits, IDS[0, 1:])


def packed_bytes(model: nn.Module) -> int:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    tensors = [t for m in layers for t in (m.weight, *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


def as_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """The same packed values in bitsandbytes' own layers, which PEFT knows."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if not isinstance(module, NF4Linear):
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None,
            compute_dtype=module.dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        layer.weight.quant_state = module.state(module.dtype)
        layer.weight.bnb_quantized = True
        layer.bias = module.bias
        layer.support_avx512bf16_for_cpu = False
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def test_without_bitsandbytes_one_line_says_what_to_install(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    with pytest.raises(AlignkitError, match="run pip install bitsandbytes") as caught:
        SFTModule(str(model_dir("llama")), quantize="nf4")
    assert "\n" not in str(caught.value)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_packed_base_answers_as_the_weights_it_stands_for(
    model_dir: ModelDir, kind: Any, family: str
) -> None:
    """Values, adapters' gradients, with and without recomputing: 1e-5 of the plain model's."""
    model = load_model(str(model_dir(family)), quantize=kind)
    assert quantization(model) == kind
    packed = {type(m).__name__ for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 1
    assert type(model.get_output_embeddings()) is nn.Linear
    shaken(inject_lora(model, LoRAConfig(r=4, targets="all-linear")))
    plain = copy.deepcopy(model)
    unquantize(plain)
    assert quantization(plain) is None
    grads = []
    for each in (model, plain, model):
        if grads and each is model:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name to come
                each.gradient_checkpointing_enable({"use_reentrant": False})
            each.train()
        each.zero_grad()
        loss = loss_of(each)
        loss.backward()
        found = {n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}
        grads.append((loss.detach(), found))
    for loss, found in grads[1:]:
        torch.testing.assert_close(loss, grads[0][0], rtol=1e-5, atol=1e-6)
        assert found.keys() == grads[0][1].keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads[0][1][name], rtol=1e-3, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_pefts_qlora_on_the_same_weights(
    model_dir: ModelDir, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The same packed bytes under both: forward and adapter gradients (bf16: to its rounding)."""
    from peft import PeftModel

    base = load_model(str(model_dir("llama")), dtype=dtype, quantize="nf4")
    peers = as_bitsandbytes(base)
    model = shaken(inject_lora(base, LoRAConfig(r=4, targets=("q_proj", "down_proj"))))
    export(model, tmp_path, "peft")
    theirs = PeftModel.from_pretrained(peers, str(tmp_path), is_trainable=True)
    assert "Linear4bit" in type(theirs.base_model.model.model.layers[0].self_attn.q_proj).__name__
    ours_loss, their_loss = loss_of(model), loss_of(theirs)
    ours_loss.backward()
    their_loss.backward()
    exact = dtype == torch.float32
    torch.testing.assert_close(ours_loss, their_loss, rtol=1e-5 if exact else 2e-2, atol=1e-6)
    their_layers = dict(theirs.base_model.model.named_modules())
    for path, layer in adapter_layers(model).items():
        for name in ("lora_A", "lora_B"):
            grad = getattr(their_layers[path], name)["default"].weight.grad
            ours = layer.adapter("default").get_parameter(name).grad
            assert ours is not None and ours.abs().max() > 0
            slack = 1e-4 if exact else 5e-2
            assert (ours.t() - grad).abs().max() <= slack * grad.abs().max()


@needs_bitsandbytes
def test_four_bits_take_a_quarter_of_bf16_and_one_fingerprint(model_dir: ModelDir) -> None:
    place = str(model_dir("llama"))
    plain = load_model(place, dtype=torch.bfloat16)
    four, eight = (load_model(place, dtype=torch.bfloat16, quantize=k) for k in KINDS)
    names = [n for n, m in four.named_modules() if isinstance(m, QuantizedLinear)]
    whole = sum(plain.get_submodule(name).weight.numel() for name in names)
    assert packed_bytes(eight) < 1.2 * whole  # a scale for each 32 weights here
    # Half a byte a weight and its scale; the two tables weigh in tiny layers.
    tables = len(names) * 4 * (16 + 256 + 2)
    assert packed_bytes(four) - tables < 0.55 * whole
    assert base_parameter_count(four) == base_parameter_count(eight) == plain.num_parameters()
    prints = {base_fingerprint(m) for m in (plain, four, eight)}
    assert len(prints) == 3
    again = load_model(place, dtype=torch.bfloat16, quantize="nf4")
    assert base_fingerprint(again) == base_fingerprint(four)
    again.to(torch.float32).to(torch.bfloat16)  # scales keep their dtype
    assert base_fingerprint(again) == base_fingerprint(four)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_dpo_shares_the_packed_base_and_resumes(
    model_dir: ModelDir, tmp_path: Path, kind: Any
) -> None:
    """One storage under both models; two epochs equal one, a checkpoint, and one."""

    def module() -> DPOModule:
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "quantize": kind,
            "optimizer": sgd,
            "schedule": "constant_with_warmup",
        }
        return DPOModule(str(model_dir("llama")), lora=LoRAConfig(r=4), **options)

    whole = module()
    trainer(tmp_path / "a", max_epochs=2).fit(whole, loader(pairs(4), 2))
    reference = whole.reference.model
    own = {n: m for n, m in whole.model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, theirs in reference.named_modules():
        if isinstance(theirs, QuantizedLinear):
            assert theirs.weight.data_ptr() == own[name].weight.data_ptr()
    half = trainer(tmp_path / "b", max_epochs=1)
    half.fit(first := module(), loader(pairs(4), 2))
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert (tmp_path / "half.ckpt").stat().st_size < 400_000
    rest = module()
    second = trainer(tmp_path / "c", max_epochs=2)
    second.fit(rest, loader(pairs(4), 2), ckpt_path=str(tmp_path / "half.ckpt"))
    assert first.global_step == 2 and rest.global_step == 4
    state = trainable_state(rest.model)
    assert state and all(torch.equal(v, state[n]) for n, v in trainable_state(whole.model).items())
    plain = DPOModule(str(model_dir("llama")), lora=LoRAConfig(r=4), dtype="bfloat16")
    with pytest.raises(AlignkitError, match=f"trained with model.quantize {kind}"):
        trainer(tmp_path / "d", max_epochs=2).fit(
            plain, loader(pairs(4), 2), ckpt_path=str(tmp_path / "half.ckpt")
        )


@needs_bitsandbytes
def test_a_run_is_exported_onto_either_base(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dequantized answers as trained; the original is another base, and said to be."""
    place = str(model_dir("llama"))
    module = SFTModule(place, lora=LoRAConfig(r=4), quantize="nf4")
    shaken(module.model)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, loader(answers(4), 2))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    trained, _ = load_policy(str(tmp_path / "run.ckpt"))
    assert quantization(trained) == "nf4"
    with torch.no_grad():
        wanted = trained(IDS).logits
        torch.testing.assert_close(module.model.eval()(IDS).logits, wanted)
    with pytest.raises(AlignkitError, match="is quantized"):
        merge_lora(trained)
    moved = {}
    for onto in ("dequantized", "original"):
        export_tool(str(tmp_path / "run.ckpt"), str(tmp_path / onto), to="merged", onto=onto)  # type: ignore[arg-type]
        told = " ".join(capsys.readouterr().out.split())
        assert f"onto the {onto} base; largest logit change" in told
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / onto)
        with torch.no_grad():
            moved[onto] = (merged.eval()(IDS).logits - wanted).abs().max().item()
    assert moved["dequantized"] < 1e-4 < 1e-2 < moved["original"]
    export_tool(str(tmp_path / "run.ckpt"), str(tmp_path / "peft"), to="peft")
    again, _ = load_policy(str(tmp_path / "peft"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, wanted)
    on_plain = load_adapter(load_model(place), tmp_path / "peft")
    assert quantization(on_plain) is None


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_finds_the_packed_values_that_it_was_trained_over(
    model_dir: ModelDir, tmp_path: Path, kind: str, dtype: str
) -> None:
    """Files in fp32, rounded or not before they are packed: the adapter's file says which."""
    module = SFTModule(str(model_dir("llama")), lora=LoRAConfig(r=4), quantize=kind, dtype=dtype)  # type: ignore[arg-type]
    shaken(module.model)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, loader(answers(4), 2))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    export_tool(str(tmp_path / "run.ckpt"), str(tmp_path / "peft"), to="peft")
    wanted = packed_values(module.model)
    for read_in in (torch.float32, torch.bfloat16):
        for place in ("run.ckpt", "peft"):
            model, _ = load_policy(str(tmp_path / place), dtype=read_in)
            found = packed_values(model)
            assert found.keys() == wanted.keys() and found
            assert all(torch.equal(values, wanted[name]) for name, values in found.items())


def packed_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@needs_bitsandbytes
def test_what_packed_weights_cannot_do_is_refused(model_dir: ModelDir) -> None:
    place = str(model_dir("llama"))
    with pytest.raises(AlignkitError, match=r"packed weights do not train \(model.lora: null\)"):
        SFTModule(place, lora=None, quantize="nf4")
    with pytest.raises(AlignkitError, match="is quantized and cannot train whole"):
        SFTModule(
            place, lora=LoRAConfig(modules_to_save="q_proj", targets="v_proj"), quantize="nf4"
        )
    with pytest.raises(AlignkitError, match=r"GPT2LMHeadModel has no torch.nn.Linear to quantize"):
        SFTModule(str(model_dir("gpt2")), quantize="int8")


@needs_bitsandbytes
def test_experts_that_stay_as_they_are_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral's experts are raw parameters, and its router is left alone."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with caplog.at_level("WARNING", logger="alignkit"):
        quantize(model, "nf4")
    (record,) = [r for r in caplog.records if "model.quantize" in r.message]
    assert "experts" in record.message and "\n" not in record.message
