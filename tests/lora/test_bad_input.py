"""Whatever can be wrong with an adapter directory: one clear line, and the model unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter
from alignkit.lora.peft_files import read_adapter
from alignkit.lora.peft_format import config_from_peft

Make = Callable[..., PreTrainedModel]

A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
FIELDS = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "init_lora_weights", "bias", "modules_to_save", "base_model_name_or_path",
)  # fmt: skip


def edit_config(**values: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))  # type: ignore[return-value]


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def link_out(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    shutil.move(path, directory.parent / "elsewhere.safetensors")
    path.symlink_to("../elsewhere.safetensors")


def pickle_instead(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (rewrite(WEIGHTS, lambda b: b[:-100]), "damaged or no safetensors file"),
    "cut in the header": (rewrite(WEIGHTS, lambda b: b[:40]), "damaged or no safetensors file"),
    "empty": (rewrite(WEIGHTS, lambda b: b""), "damaged or no safetensors file"),
    "a pickle by that name": (rewrite(WEIGHTS, lambda b: b"\x80\x04K\x01."), "damaged"),
    "one bit flipped": (rewrite(WEIGHTS, flip_last_bit), "does not match its checksum"),
    "header altered": (rewrite(WEIGHTS, lambda b: b.replace(b"h.1.attn", b"h.2.attn")), "checksum"),
    "missing tensor": (edit_tensors(lambda t: t.pop(A)), f"missing {A}"),
    "extra tensor": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "wrong rank": (
        edit_tensors(lambda t: t.update({A: torch.zeros(3, 32)})),
        f"{A} is 3x32, the model's is 4x32",
    ),
    "NaN": (edit_tensors(lambda t: t[A].fill_(float("nan"))), f"{A} holds NaN"),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].int()})), "torch.int32"),
    "another method": (edit_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (edit_config(peft_type=None), "peft_type is None"),
    "another rank in the config": (edit_config(r=8), "is 4x32, the model's is 8x32"),
    "rank of another type": (edit_config(r="8"), "LoRAConfig.r is '8'"),
    "alpha of another type": (edit_config(lora_alpha="x"), "LoRAConfig.alpha is 'x'"),
    "patterns of another type": (edit_config(rank_pattern=3), "adapter_config.json: "),
    "targets of another model": (
        edit_config(target_modules=["q_proj"]),
        "'q_proj' matches no module",
    ),
    "no targets": (edit_config(target_modules=None), "target_modules is missing"),
    "a start that changed the base": (edit_config(init_lora_weights="loftq"), "'loftq'"),
    "a random start": (edit_config(init_lora_weights="pissa_niter_4"), "'pissa_niter_4'"),
    "an unhashable start": (edit_config(init_lora_weights=[1]), "init_lora_weights"),
    "a variant not known here": (edit_config(use_qalora=True), "use_qalora is set"),
    "not JSON": (rewrite(CONFIG, lambda b: b[:-9]), "not JSON"),
    "not text": (rewrite(CONFIG, lambda b: b"\xff\xfe\x00"), "not JSON"),
    "nested beyond reason": (rewrite(CONFIG, lambda b: b"[" * 100_000), "not JSON"),
    "a list": (rewrite(CONFIG, lambda b: b"[]"), "holds a list"),
    "no config": (lambda d: (d / CONFIG).unlink(), "adapter_config.json: no such file"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
    "a pickle": (pickle_instead, "is a pickle and never opened"),
    "a link out of the directory": (link_out, "leads outside its directory"),
    "no directory": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "injected"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_and_changes_nothing(
    tiny_model: Make, saved: Path, damage: str, fresh: bool
) -> None:
    model = tiny_model("gpt2", seed=3)
    if not fresh:
        inject_lora(model, LoRAConfig(r=4, targets=("attn.c_attn", "attn.c_proj")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    act, words = DAMAGE[damage]
    act(saved)
    with pytest.raises(AlignkitError) as error:
        load_adapter(model, saved)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags


def outcome(act: Callable[[], object]) -> object:
    """What a call returns, or the one-line refusal it ends in."""
    try:
        return act()
    except AlignkitError as error:
        return str(error)


def test_no_flipped_byte_goes_unseen(saved: Path) -> None:
    """Any byte of the weights file changed: refused, or (in the header's padding) no difference."""
    path = saved / WEIGHTS
    content, want = path.read_bytes(), load_file(path)
    random = torch.Generator().manual_seed(0)
    for turn in range(300):
        at = int(torch.randint(len(content), (), generator=random))
        at = at % 1500 if turn % 2 else at  # every other one within the header
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        result = outcome(lambda: read_adapter(saved).tensors)
        if isinstance(result, str):
            assert "\n" not in result
        else:
            assert isinstance(result, dict)
            assert result.keys() == want.keys()
            assert all(torch.equal(result[key], want[key]) for key in want)


@settings(deadline=None, max_examples=300)
@given(
    field=st.sampled_from(FIELDS),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)
def test_any_value_in_the_config_is_read_or_refused_in_one_line(field: str, value: object) -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], field: value}
    result = outcome(lambda: config_from_peft(raw, "adapter_config.json"))
    assert isinstance(result, LoRAConfig) or "\n" not in str(result)


def test_an_adapter_of_another_base(
    tiny_model: Make, trained: PreTrainedModel, saved: Path
) -> None:
    with pytest.raises(AlignkitError, match=r"'attn.c_attn' matches no module; near: "):
        load_adapter(tiny_model("llama"), saved)


def test_base_weights_beside_the_adapter_must_be_this_bases(
    tiny_model: Make, trained: PreTrainedModel, saved: Path, ids: Tensor
) -> None:
    """PEFT saves adapted embeddings whole; they are checked against the base, then left out."""
    head = "base_model.model.transformer.wte.base_layer.weight"
    weight = trained.transformer.wte.weight.detach()
    edit_tensors(lambda t: t.update({head: weight.clone()}))(saved)
    assert torch.equal(load_adapter(tiny_model("gpt2"), saved)(ids).logits, trained(ids).logits)
    edit_tensors(lambda t: t.update({head: weight + 1}))(saved)
    with pytest.raises(AlignkitError, match="load the base the adapter was trained on"):
        load_adapter(tiny_model("gpt2"), saved)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8}, "is 8x32, the model's is 4x32"),
        ({"alpha": 4}, "has scale 4.0, adapter 'default' of the model has 1.0"),
        ({"init": "pissa"}, "has init gaussian, adapter 'default' of the model has pissa"),
        ({"targets": "c_attn"}, "missing "),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_an_adapter_built_otherwise_is_not_filled(
    tiny_model: Make, saved: Path, options: dict[str, object], words: str
) -> None:
    options = {"r": 4, "targets": ("attn.c_attn", "attn.c_proj"), **options}
    model = inject_lora(tiny_model("gpt2"), LoRAConfig(**options))  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AlignkitError) as error:
        load_adapter(model, saved)
    assert words in str(error.value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
