"""``model.reference``: what a policy is compared with, what says so, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from alignkit.engine import collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, save_adapter
from alignkit.models.checkpoint import load_policy
from alignkit.modules import DPOModule, SFTModule
from alignkit.objectives.preference import DPO, SimPO
from tests.modules.helpers import answers, loader, pairs, trainer

ModelDir = Callable[[str], Path]


def fit(module: object, directory: Path, steps: int, examples: list, resume: Path | None = None):
    """Train and checkpoint each step; return the last checkpoint."""
    saver = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1, save_top_k=-1)
    callbacks = {"callbacks": [saver], "enable_checkpointing": True} if resume is None else {}
    run = trainer(directory, max_steps=steps, **callbacks)
    run.fit(module, loader(examples, 2), ckpt_path=resume)
    return directory / "last.ckpt"


@pytest.fixture
def sft(model_dir: ModelDir, tmp_path: Path) -> Path:
    module = SFTModule(str(model_dir("gpt2")), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    return fit(module, tmp_path / "sft", 3, answers(8))


@pytest.fixture
def other(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A whole model of another width, with the same tokens."""
    torch.manual_seed(5)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=384, n_positions=512, n_embd=16, n_layer=1, n_head=2, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_dir("gpt2")).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def sums(model: torch.nn.Module) -> torch.Tensor:
    batch = collate(pairs(4))
    with torch.no_grad():
        return response_sums(score(model.eval(), batch), batch)


def test_each_choice_scores_as_the_model_that_it_names(
    model_dir: ModelDir, sft: Path, other: Path, tmp_path: Path
) -> None:
    """From SFT: a copy is that, the base is not, and a path is what lies there."""
    base = str(model_dir("gpt2"))
    policy, _ = load_policy(str(sft))
    save_adapter(policy, tmp_path / "adapter", base=base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    wanted = {
        None: sums(policy),
        "copy": sums(policy),
        "base": sums(plain),
        str(sft): sums(policy),
        str(sft.parent): sums(policy),
        str(tmp_path / "adapter"): sums(policy),
        base: sums(plain),
        str(other): sums(AutoModelForCausalLM.from_pretrained(other)),
    }
    assert not torch.allclose(wanted["copy"], wanted["base"], atol=1e-2)
    for choice, expected in wanted.items():
        module = DPOModule(base, init_from=str(sft), reference=choice)
        batch = collate(pairs(4))
        torch.testing.assert_close(module.reference.sums(batch), expected, atol=1e-4, rtol=1e-5)
        ignored = set(module._ddp_params_and_buffers_to_ignore)
        named = module.named_parameters(remove_duplicate=False)
        assert {n for n, _ in named if n.startswith("reference.")} <= ignored
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(4), 2))
        torch.testing.assert_close(module.reference.sums(batch), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(init="pissa", r=4)], ids=["", "pissa"])
def test_the_base_costs_no_memory(model_dir: ModelDir, sft: Path, lora: LoRAConfig) -> None:
    """Also where adapters start as a part of the base that is taken from it."""
    module = DPOModule(str(model_dir("gpt2")), lora=lora, reference="base")
    policy = {p.data_ptr() for p in module.model.parameters()}
    assert {p.data_ptr() for p in module.reference.model.parameters()} <= policy
    plain = AutoModelForCausalLM.from_pretrained(model_dir("gpt2"))
    torch.testing.assert_close(sums(module.reference.model), sums(plain), atol=1e-4, rtol=1e-5)


def test_a_path_shares_what_is_equal_with_the_policy(model_dir: ModelDir, sft: Path) -> None:
    module = DPOModule(str(model_dir("gpt2")), reference=str(sft))
    policy = {p.data_ptr() for p in module.model.parameters() if not p.requires_grad}
    theirs = dict(module.reference.model.named_parameters())
    own = [name for name, p in theirs.items() if p.data_ptr() not in policy]
    assert own
    assert all("lora_" in name for name in own)


def test_with_the_whole_model_in_training_a_path_names_its_base(model_dir: ModelDir) -> None:
    base = str(model_dir("gpt2"))
    module = DPOModule(base, lora=None, reference=base)
    torch.testing.assert_close(
        sums(module.reference.model), sums(AutoModelForCausalLM.from_pretrained(base))
    )


def test_identity_is_content(model_dir: ModelDir, sft: Path, other: Path, tmp_path: Path) -> None:
    """One reference under several names has one fingerprint and cache; another has another."""
    base, cache = str(model_dir("gpt2")), str(tmp_path / "cache")

    def named(choice: str | None, start: Path | None = sft) -> tuple[str, str]:
        init_from = None if start is None else str(start)
        module = DPOModule(base, init_from=init_from, reference=choice, reference_cache=cache)
        stamp = module.checkpoint_stamp()["reference_fingerprint"]
        return stamp, module.reference.cache.home.name

    assert named("copy") == named(str(sft)) == named(None) == named(str(sft), None)
    assert named("base") == named("copy", None) == named("base", None)
    assert len({named(choice) for choice in ("copy", "base", str(other))}) == 3
    # Equal weights that compute something else.
    config = other / "config.json"
    before = named(str(other))
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    assert named(str(other)) != before


def test_a_run_resumes_against_its_own_reference_alone(
    model_dir: ModelDir, sft: Path, tmp_path: Path
) -> None:
    base = str(model_dir("gpt2"))

    def module(choice: str) -> DPOModule:
        return DPOModule(base, init_from=str(sft), reference=choice)

    path = fit(module("base"), tmp_path / "run", 1, pairs(8))
    fit(module("base"), tmp_path / "again", 2, pairs(8)[2:], path)
    with pytest.raises(AlignkitError, match="was trained against another reference") as error:
        fit(module("copy"), tmp_path / "other run", 2, pairs(8)[2:], path)
    assert "model.reference" in str(error.value)


def test_what_does_not_go_together_is_one_line(
    model_dir: ModelDir, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = str(model_dir("gpt2"))
    assert DPOModule(base, loss=SimPO(), reference="none").reference is None
    odd = tmp_path / "odd"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(odd)
    tokens = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokens.add_tokens(["<new>"])
    tokens.save_pretrained(odd)
    wrong: list[tuple[dict, str]] = [
        ({"reference": "none"}, "model.reference none: DPO compares the policy with a reference"),
        ({"reference": "copy", "loss": SimPO()}, "model.reference copy: SimPO uses no reference"),
        ({"reference": "base", "loss": SimPO()}, "model.reference base: SimPO uses no reference"),
        ({"reference": "base", "lora": None}, "model.reference base: the whole model trains"),
        ({"reference": "nowhere"}, "model.reference nowhere: there is no such file or folder"),
        ({"reference": str(tmp_path)}, f"model.reference {tmp_path}: "),
        ({"reference": str(odd)}, "its tokenizer has other tokens than the policy's"),
    ]
    for options, said in wrong:
        with pytest.raises(AlignkitError) as error:
            DPOModule(base, **{"loss": DPO(), **options})
        assert said in str(error.value)
        assert "\n" not in str(error.value)
