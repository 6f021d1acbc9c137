"""Tiny random models and a tokenizer made on the spot: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

FAMILIES = ("gpt2", "gpt_neox", "llama")
VOCAB = 384

torch.set_num_threads(1)


def tiny_config(family: str) -> PretrainedConfig:
    """A two-layer config of one of the tested families, wide enough to be wrong visibly."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=32, n_layer=2, n_head=4, **ids)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**shape, **ids)
    return LlamaConfig(**shape, num_key_value_heads=2, **ids)


@pytest.fixture(autouse=True)
def _leave_no_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End what a DDP run in this process began: its group, the address it chose and its rank."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and forget what the test sets
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Trainers set it, and loggers obey it
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """What transformers advises about models that a test made up is not at stake."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    yield
    hf_logging.set_verbosity(before)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, seed=0)``: a random fp32 model in eval mode."""

    def make(family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        with torch.no_grad():
            for parameter in model.parameters():
                # Wider than the initialisation, so that attention and head are far from uniform.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model.eval()

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each tested model family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer directory, eos = pad = id 0, at most VOCAB ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = ["\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast."] * 8
    tokenizer.train_from_iterator(text, trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> Callable[[str], Path]:
    """``model_dir(family)``: a directory with a tiny random model and the tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str = "gpt2") -> Path:
        if family not in made:
            from transformers import AutoTokenizer

            directory = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(directory)
            AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
            made[family] = directory
        return made[family]

    return make


@pytest.fixture(scope="session")
def moved_models(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]
) -> dict[str, str]:
    """A tiny llama as ``base``, and as ``dpo`` an adapter that moves its answers."""
    from alignkit.lora import LoRAConfig, inject_lora, save_adapter
    from alignkit.models import load_model

    base, adapter = str(model_dir("llama")), tmp_path_factory.mktemp("moved") / "dpo"
    model = inject_lora(load_model(base), LoRAConfig(r=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    save_adapter(model, adapter, base=base)
    return {"base": base, "dpo": str(adapter)}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data and tokenizers; the test is skipped without one."""
    directory = os.environ.get("ALIGNKIT_REAL_DATA")
    if not directory:
        pytest.skip("ALIGNKIT_REAL_DATA is unset: no real data on this machine")
    return Path(directory)
