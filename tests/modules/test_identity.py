"""Weights are loaded only where they mean what they meant: same scale, start, base and config."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.engine import collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, save_adapter
from alignkit.lora.identity import difference, identity, trained_fingerprint
from alignkit.lora.inject import inject_lora
from alignkit.models.checkpoint import load_policy, read_checkpoint
from alignkit.modules import DPOModule, SFTModule
from tests.modules.helpers import answers, loader, pairs, trainer
from tests.modules.test_checkpoints import fit

ModelDir = Callable[[str], Path]

OWN = LoRAConfig(r=4, alpha=8, targets=("c_attn", "attn.c_proj"))
PATHS = tuple(f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj"))
BATCH = collate(pairs(3))


def error_of(act: Callable[[], object]) -> str:
    """The one line a call is refused with."""
    with pytest.raises(AlignkitError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trained(base: Path, directory: Path, lora: LoRAConfig | None = OWN, **options: Any) -> Path:
    return fit(SFTModule(str(base), lora=lora, **options), directory, 2, answers(4))


@pytest.fixture(scope="module")
def ckpt(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT checkpoint of `OWN` on gpt2."""
    return trained(model_dir("gpt2"), tmp_path_factory.mktemp("sft"))


OTHER: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "alpha": ({"alpha": 64}, ("lora.alpha is 8 there", "64 here")),
    "rslora": ({"use_rslora": True}, ("use_rslora is False there", "True here")),
    "dora": ({"use_dora": True}, ("use_dora is False there", "True here")),
    "pissa": ({"init": "pissa"}, ("init is gaussian there", "pissa here")),
    "rank": ({"r": 8, "alpha": 16}, ("lora.r is 4 there", "8 here")),
    "fewer targets": ({"targets": "c_attn"}, ("c_attn, c_proj (4 modules)", "c_attn (2 modules)")),
    "layers": ({"layers": "0"}, ("(4 modules)", "(2 modules)")),
    "alpha of one module": ({"alpha_pattern": {r".*\.1\..*": 3}}, ("alpha is 8 there", "3 here")),
    "bias": ({"bias": "lora_only"}, ("bias is none there", "lora_only here")),
    "modules to save": ({"modules_to_save": ("ln_f",)}, ("(4 modules)", "(5 modules)")),
    "in full": ({}, ("an adapter", "null")),
}


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("by", ["init_from", "ckpt_path"])
def test_what_changes_the_function_is_refused_with_both_values(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path, change: str, by: str
) -> None:
    """Each of them but the rank loads without a word where names and shapes alone are looked at."""
    base = str(model_dir("gpt2"))
    settings, said = OTHER[change]
    lora = dataclasses.replace(OWN, **settings) if settings else None

    def load() -> object:
        if by == "init_from":
            return DPOModule(base, lora=lora, init_from=str(ckpt))
        run = trainer(tmp_path, max_steps=3)
        return run.fit(SFTModule(base, lora=lora), loader(answers(4), 2), ckpt_path=str(ckpt))

    line = error_of(load)
    assert all(words in line for words in said), line
    assert line.startswith(by)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": r".*\.attn\.(c_attn|c_proj)"},
        {"targets": PATHS},
        {"targets": "all-linear", "exclude": r".*mlp.*"},
        {"alpha": 4, "use_rslora": True},  # 4 / √4 = 8 / 4
        {"r": 2, "rank_pattern": {".*": 4}},
        {"init": "kaiming", "init_std": 0.5, "dropout": 0.3},
        {"untie": True},
    ],
)
def test_the_same_function_in_other_words_is_taken(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path, settings: dict[str, Any]
) -> None:
    lora = dataclasses.replace(OWN, **settings)
    module = SFTModule(str(model_dir("gpt2")), lora=lora, init_from=str(ckpt))
    module.model.eval()
    assert torch.equal(score(module.model, BATCH), score(load_policy(str(ckpt))[0], BATCH))
    module.on_load_checkpoint(read_checkpoint(ckpt))


def test_a_bias_that_no_module_has_is_no_difference(model_dir: ModelDir, tiny_model: Any) -> None:
    model = tiny_model("llama")
    config = LoRAConfig(targets="q_proj")
    other = dataclasses.replace(config, bias="lora_only")
    assert difference(identity(model, config), identity(model, other)) is None


@pytest.mark.parametrize("edit", [{"alpha": 64.0}, {"use_rslora": True}, {"init": "olora"}])
def test_a_checkpoint_at_odds_with_its_own_settings_is_refused(
    model_dir: ModelDir, ckpt: Path, tmp_path: Path, edit: dict[str, Any]
) -> None:
    """Generation, comparison and export rebuild the adapter from the file's settings alone."""
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["hyper_parameters"]["lora"] |= edit
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    line = error_of(lambda: load_policy(str(tmp_path / "edited.ckpt")))
    assert "there" in line and "here" in line


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_subtracted_start_is_kept_rather_than_computed_again(
    model_dir: ModelDir, tmp_path: Path, start: Any
) -> None:
    """In bfloat16 the base's singular vectors are others, and so would be what is taken away."""
    lora = LoRAConfig(r=4, init=start, targets="q_proj")
    module = SFTModule(str(model_dir("llama")), lora=lora)
    path = fit(module, tmp_path / "run", 2, answers(4))
    kept = {name: value for name, value in module.state_dict().items() if "start_" in name}
    assert len(kept) == 2 * 2
    policy, _ = load_policy(str(path), dtype=torch.bfloat16)
    again = SFTModule(str(model_dir("llama")), init_from=str(path), dtype="bfloat16")
    for model in (policy, again.model):
        named = dict(model.named_parameters())
        for name, value in kept.items():
            assert torch.equal(named[name.removeprefix("model.")], value), name


# What init_from says by itself --------------------------------------------------------------


def test_a_checkpoint_says_what_adapter_it_holds(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    module = DPOModule(str(model_dir("gpt2")), init_from=str(ckpt))
    assert module.lora == OWN
    assert module.hparams["lora"] == OWN.to_dict()
    sft, _ = load_policy(str(ckpt))
    assert torch.equal(score(module.model, BATCH), score(sft, BATCH))
    assert torch.equal(score(module.reference.model, BATCH), score(sft, BATCH))
    path = fit(module, tmp_path / "dpo", 1, pairs(2))
    assert read_checkpoint(path)["hyper_parameters"]["lora"] == OWN.to_dict()
    again = DPOModule.load_from_checkpoint(path)
    assert again.lora == OWN
    policy, _ = load_policy(str(path))
    module.model.eval()
    assert torch.equal(score(policy, BATCH), score(module.model, BATCH))


def test_a_whole_model_goes_on_as_a_whole(model_dir: ModelDir, tmp_path: Path) -> None:
    path = trained(model_dir("gpt2"), tmp_path / "full", None)
    module = DPOModule(str(model_dir("gpt2")), init_from=str(path))
    assert module.lora is None
    assert all(parameter.requires_grad for parameter in module.model.parameters())
    line = error_of(lambda: DPOModule(str(model_dir("gpt2")), lora=OWN, init_from=str(path)))
    assert "the whole model is trained (model.lora: null) there and an adapter is here" in line


def test_without_a_start_the_default_adapter_is_trained(model_dir: ModelDir) -> None:
    assert SFTModule(str(model_dir("gpt2"))).lora == LoRAConfig()


def test_an_adapter_is_not_trained_in_full(ckpt: Path, model_dir: ModelDir) -> None:
    line = error_of(lambda: SFTModule(str(model_dir("gpt2")), lora=None, init_from=str(ckpt)))
    assert "model.lora: null" in line and "--to merged" in line


@pytest.fixture
def adapter(ckpt: Path, model_dir: ModelDir, tmp_path: Path) -> Path:
    """The checkpoint's adapter in PEFT's format, as PEFT itself would leave it."""
    policy, _ = load_policy(str(ckpt))
    return save_adapter(policy, tmp_path / "adapter", base=str(model_dir("gpt2")))


@pytest.mark.parametrize("change", [c for c in OTHER if c not in ("dora", "pissa")])
def test_a_peft_adapter_is_held_against_what_is_asked_for(
    adapter: Path, model_dir: ModelDir, change: str
) -> None:
    base, (settings, said) = str(model_dir("gpt2")), OTHER[change]
    assert SFTModule(base, init_from=str(adapter)).lora.alpha == 8
    lora = dataclasses.replace(OWN, **settings) if settings else None
    line = error_of(lambda: SFTModule(base, lora=lora, init_from=str(adapter)))
    assert all(words in line for words in said if settings), line
    assert ("auto" in line) == bool(settings)


def test_dropout_is_the_users_to_choose(adapter: Path, model_dir: ModelDir) -> None:
    lora = dataclasses.replace(OWN, dropout=0.25)
    module = SFTModule(str(model_dir("gpt2")), lora=lora, init_from=str(adapter))
    layer = module.model.transformer.h[0].attn.c_attn
    assert layer.adapter("default").config.dropout == 0.25


# The base -----------------------------------------------------------------------------------


def with_setting(source: Path, target: Path, **settings: Any) -> str:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(target)


SETTINGS = {
    "rope_parameters": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, "rope_parameters.factor",
    ),
    "rms_norm_eps": (0.01, "rms_norm_eps is 1e-06 there and 0.01 here"),
    "hidden_act": ("gelu", "hidden_act is 'silu' there and 'gelu' here"),
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_a_base_with_another_config_is_another_base(
    model_dir: ModelDir, tmp_path: Path, key: str
) -> None:
    """The very same weight file; scores lie tenths of a nat apart and more."""
    lora = LoRAConfig(r=2, targets="q_proj")
    path = trained(model_dir("llama"), tmp_path / "run", lora)
    value, said = SETTINGS[key]
    base = with_setting(model_dir("llama"), tmp_path / "other", **{key: value})
    for act in (
        lambda: SFTModule(base, init_from=str(path)),
        lambda: load_policy(str(path), base=base),
        lambda: SFTModule(base, lora=lora).on_load_checkpoint(read_checkpoint(path)),
    ):
        line = error_of(act)
        assert "another base model" in line and said in line, line


def test_a_model_made_from_a_config_alone_wants_that_config(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    """Its weights all lie in the checkpoint; what they compute still rests on the base's config."""
    path = trained(model_dir("llama"), tmp_path / "run", None, random_init=True)
    load_policy(str(path))
    base = with_setting(model_dir("llama"), tmp_path / "other", rms_norm_eps=0.01)
    assert "rms_norm_eps" in error_of(lambda: load_policy(str(path), base=base))


def test_an_exported_adapter_knows_its_base(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    from alignkit.tools.export import export

    for to, name in (("peft", "peft"), ("safetensors", "file")):
        export(str(ckpt), str(tmp_path / name), to=to)  # type: ignore[arg-type]
    places = [tmp_path / "peft", tmp_path / "file" / "adapter.safetensors"]
    other = tmp_path / "other"
    shutil.copytree(model_dir("gpt2"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    want, _ = load_policy(str(ckpt))
    for place in places:
        policy, _ = load_policy(str(place))
        assert torch.equal(score(policy, BATCH), score(want, BATCH))
        module = SFTModule(str(model_dir("gpt2")), init_from=str(place), dtype="bfloat16")
        assert identity(module.model, module.lora) == identity(want, OWN)
        assert "another base" in error_of(lambda p=place: load_policy(str(p), base=str(other)))
        assert "another base" in error_of(lambda p=place: SFTModule(str(other), init_from=str(p)))


def test_half_precision_does_not_make_it_another_base(ckpt: Path) -> None:
    policy, _ = load_policy(str(ckpt), dtype=torch.float16)
    dtypes = {p.dtype for n, p in policy.named_parameters() if "adapters" not in n}
    assert dtypes == {torch.float16}
    assert {p.dtype for n, p in policy.named_parameters() if "adapters" in n} == {torch.float32}


def refusals(base: str, checkpoint: str, workplace: Path) -> list[str]:
    """Return what is said of a bad checkpoint by each way of loading one."""
    run = trainer(workplace, max_steps=3)
    return [
        error_of(lambda: SFTModule(base, init_from=checkpoint)),
        error_of(lambda: load_policy(checkpoint)),
        error_of(
            lambda: run.fit(SFTModule(base, lora=OWN), loader(answers(4), 2), ckpt_path=checkpoint)
        ),
    ]


def test_a_checkpoint_of_an_earlier_version_says_so(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    checkpoint = torch.load(ckpt, weights_only=True)
    for key in ("version", "adapter", "base_settings"):
        del checkpoint["alignkit"][key]
    old = str(tmp_path / "old.ckpt")
    torch.save(checkpoint, old)
    base = str(model_dir("gpt2"))
    for line in refusals(base, old, tmp_path):
        assert "earlier alignkit" in line and "another base" not in line


# The reference ------------------------------------------------------------------------------


def test_the_references_name_holds_the_scale(tiny_model: Any) -> None:
    """The same A and B under another α are another function, and score otherwise."""
    names = set()
    for settings in ({}, {"alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {r".*\.1\..*": 2}}):
        torch.manual_seed(0)
        model = inject_lora(tiny_model("gpt2"), dataclasses.replace(OWN, **settings))
        untrained = trained_fingerprint(model)
        assert untrained == trained_fingerprint(inject_lora(tiny_model("gpt2"), LoRAConfig(r=2)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.fill_(0.1)
        names.add(trained_fingerprint(model))
    assert len(names) == 4


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_references_name_holds_no_draw(use_dora: bool, tiny_model: Any) -> None:
    """Orthogonal factors are not zero, and their product is: each session draws others."""
    names = set()
    for seed in range(2):
        model = tiny_model("llama")
        torch.manual_seed(seed)
        inject_lora(model, LoRAConfig(r=4, init="orthogonal", use_dora=use_dora))
        names.add(trained_fingerprint(model))
    assert len(names) == 1
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_B")).add_(1e-4)
    assert trained_fingerprint(model) not in names


def test_a_cache_is_not_shared_by_references_of_another_scale_or_config(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["hyper_parameters"]["lora"]["alpha"] = 64.0
    for values in checkpoint["alignkit"]["adapter"].values():
        values["alpha"] = 64.0
    torch.save(checkpoint, tmp_path / "louder.ckpt")
    for path in (ckpt, tmp_path / "louder.ckpt"):
        DPOModule(str(model_dir("gpt2")), init_from=str(path), reference_cache=str(cache))
    assert len(list(cache.iterdir())) == 2
    DPOModule(str(model_dir("gpt2")), init_from=str(ckpt), reference_cache=str(cache))
    assert len(list(cache.iterdir())) == 2
    other = with_setting(model_dir("gpt2"), tmp_path / "other", layer_norm_epsilon=0.1)
    DPOModule(other, reference_cache=str(cache))
    DPOModule(str(model_dir("gpt2")), reference_cache=str(cache))
    assert len(list(cache.iterdir())) == 4


# Numbers that are none ------------------------------------------------------------------------


def spoil(ckpt: Path, where: Callable[[dict[str, Any]], torch.Tensor], path: Path) -> str:
    checkpoint = torch.load(ckpt, weights_only=True)
    where(checkpoint).view(-1)[1] = float("nan")
    torch.save(checkpoint, path)
    return str(path)


A = "model.transformer.h.1.attn.c_attn.adapters.default.lora_A"


def test_a_weight_that_is_no_number_is_named_on_every_load(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    base = str(model_dir("gpt2"))
    bad = spoil(ckpt, lambda c: c["state_dict"][A], tmp_path / "nan.ckpt")
    for line in refusals(base, bad, tmp_path):
        assert f"state_dict.{A} holds NaN or infinity" in line, line


def test_an_optimizer_state_that_is_no_number_is_named(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    def moment(checkpoint: dict[str, Any]) -> torch.Tensor:
        return checkpoint["optimizer_states"][0]["state"][0]["exp_avg_sq"]

    bad = spoil(ckpt, moment, tmp_path / "nan.ckpt")
    run = trainer(tmp_path, max_steps=3)
    module = SFTModule(str(model_dir("gpt2")), lora=OWN)
    line = error_of(lambda: run.fit(module, loader(answers(4), 2), ckpt_path=bad))
    assert "optimizer_states.0.state.0.exp_avg_sq holds NaN" in line


def test_what_callbacks_watch_may_be_infinite(
    ckpt: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["callbacks"]["EarlyStopping"] = {"best_score": torch.tensor(float("inf"))}
    torch.save(checkpoint, tmp_path / "fine.ckpt")
    load_policy(str(tmp_path / "fine.ckpt"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_base_that_holds_no_numbers_is_named(
    model_dir: ModelDir, tmp_path: Path, value: str
) -> None:
    """It was called an unsupported architecture."""
    shutil.copytree(model_dir("llama"), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float(value)
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    line = error_of(lambda: SFTModule(str(tmp_path / "bad"), lora=LoRAConfig(targets="q_proj")))
    assert re.search(rf"{name} holds NaN or infinity in float32", line), line


def test_scores_that_overflow_are_no_unsupported_architecture(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    """All weights are numbers, their products are not."""
    shutil.copytree(model_dir("llama"), tmp_path / "loud")
    tensors = load_file(tmp_path / "loud" / "model.safetensors")
    for name in tensors:
        if "proj" in name:
            tensors[name] *= 1e30
    save_file(tensors, tmp_path / "loud" / "model.safetensors", metadata={"format": "pt"})
    line = error_of(lambda: SFTModule(str(tmp_path / "loud"), lora=LoRAConfig(targets="q_proj")))
    assert "itself scores NaN or infinity" in line
    assert "not supported" not in line
