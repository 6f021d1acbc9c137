"""A tokenizer with more ids than the model has embeddings is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignkit.errors import AlignkitError
from alignkit.modules import DPOModule, SFTModule
from tests.cli.test_fit import quick
from tests.modules.helpers import answers, loader, pairs, trainer

BOTH = "has {} token ids and the model '{}' 384 embeddings"


@pytest.fixture
def bigger(model_dir: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A tokenizer whose last tokens occur in no text, and its size."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(385 - len(tokenizer))])
    directory = tmp_path_factory.mktemp("bigger")
    tokenizer.save_pretrained(directory)
    return directory, len(tokenizer)


@pytest.mark.parametrize("stage", ["lora", "sft", "dpo"])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_training_refuses(
    stage: str,
    command: str,
    alignkit: Callable,
    model_dir: Callable,
    hh: Path,
    text: Path,
    bigger: tuple[Path, int],
) -> None:
    tokenizer, size = bigger
    arguments = quick(f"demo/{stage}.yaml", model_dir, hh, text)
    arguments[0] = command
    status, _, err = alignkit(*arguments, "--model.tokenizer", tokenizer)
    assert status == 2
    assert BOTH.format(size, model_dir("llama")) in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_an_eos_beyond_the_embeddings(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|turn_end|>"})
    tokenizer.save_pretrained(tmp_path)
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    status, _, err = alignkit(*arguments, "--model.tokenizer", tmp_path)
    assert status == 2
    assert BOTH.format(385, model_dir("llama")) in err


@pytest.mark.parametrize("command", ["generate", "compare", "export"])
def test_tools_refuse(
    command: str, alignkit: Callable, model_dir: Callable, bigger: tuple[Path, int]
) -> None:
    import shutil

    directory = bigger[0].parent / f"model_{command}"
    shutil.copytree(model_dir("llama"), directory)
    AutoTokenizer.from_pretrained(bigger[0]).save_pretrained(directory)
    flags = {
        "generate": ["--model", directory, "--prompts", "Hi"],
        "compare": ["--models", directory, "--prompts", "Hi"],
        "export": ["--model", directory, "--output", "out", "--to", "merged"],
    }
    status, _, err = alignkit(command, *flags[command])
    assert status == 2
    assert BOTH.format(bigger[1], directory) in err


@pytest.mark.parametrize("module", [SFTModule, DPOModule])
@pytest.mark.parametrize("token", [384, -1])
def test_data_of_ones_own_is_refused_too(
    module: Any, token: int, model_dir: Callable, tmp_path: Path
) -> None:
    examples = pairs(4) if module is DPOModule else answers(4)
    examples[1].responses[0][-1] = token
    run = trainer(tmp_path, max_steps=2)
    with pytest.raises(AlignkitError, match=f"the token id {token}, and the model has 384"):
        run.fit(module(str(model_dir("gpt2"))), loader(examples, 2))


def test_an_embedding_larger_than_the_tokenizer_is_usual(model_dir: Callable) -> None:
    assert len(AutoTokenizer.from_pretrained(model_dir("llama"))) < 384
