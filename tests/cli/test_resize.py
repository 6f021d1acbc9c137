"""Added tokens with resized embeddings: trained, asked, exported, and gone on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.models.checkpoint import load_policy
from tests.cli.test_fit import quick


@pytest.fixture
def bigger(model_dir: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A tokenizer with an end of turn of its own, beyond the model's embeddings, and its size."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|turn_end|>"})
    directory = tmp_path_factory.mktemp("bigger")
    tokenizer.save_pretrained(directory)
    return directory, len(tokenizer)


SAVED = ["--model.lora.modules_to_save", "[embed_tokens, lm_head]"]


def test_new_tokens_train_and_travel(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, bigger: tuple[Path, int],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tokenizer, size = bigger
    assert size == 385
    head = ["--model.tokenizer", tokenizer]
    untie = ["--model.lora.untie", "true"]
    sft = quick("demo/sft.yaml", model_dir, hh, text)
    status, _, err = alignkit(*sft, *head, "--model.resize_embeddings", "true", *SAVED, *untie)
    assert status == 0, err
    (last,) = Path("runs").rglob("last.ckpt")
    kept = torch.load(last, weights_only=True)
    assert kept["hyper_parameters"]["resize_embeddings"] == 385
    model, loaded = load_policy(str(last))
    assert len(loaded) == 385 and model.config.vocab_size == 385
    ids = torch.tensor([loaded("Bread?")["input_ids"] + [384]])
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.shape[-1] == 385

    status, _, err = alignkit(
        "generate", "--model", last, "--prompts", "Hi", "--max_new_tokens", "2"
    )
    assert status == 0, err
    for to in ("merged", "peft"):
        status, _, err = alignkit("export", "--model", last, "--output", tmp_path / to, "--to", to)
        assert status == 0, err
        assert len(AutoTokenizer.from_pretrained(tmp_path / to)) == 385
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)
    again, loaded = load_policy(str(tmp_path / "peft"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(loaded) == 385

    # The next stage takes adapter and rows from the checkpoint, without a flag.
    for start in (last, tmp_path / "peft"):
        dpo = quick("demo/dpo.yaml", model_dir, hh, text)
        status, _, err = alignkit(*dpo, *head, "--model.init_from", start, "--model.lora", "auto")
        assert status == 0, err


@pytest.mark.parametrize("start", ["resize", "random"])
def test_what_must_train_is_said(
    start: str, alignkit: Callable, model_dir: Callable, hh: Path, text: Path,
    bigger: tuple[Path, int], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    flags = ["--model.tokenizer", bigger[0], "--model.resize_embeddings", "true"]
    if start == "random":
        flags += ["--model.lora", "null", "--model.dtype", "float32"]
    with caplog.at_level(logging.WARNING):
        status, _, err = alignkit(*arguments, *flags)
    assert status == 0, err
    said = (
        "1 new token ids keep the mean of the others' embeddings, as model.embed_tokens and lm_head"
    )
    assert (said in caplog.text + err) == (start == "resize")
    (last,) = Path("runs").rglob("last.ckpt")
    assert load_policy(str(last))[0].config.vocab_size == 385
    config = json.loads((Path(model_dir("llama")) / "config.json").read_text())
    assert config["vocab_size"] == 384


def test_without_the_flag_the_line_names_it(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, bigger: tuple[Path, int]
) -> None:
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    status, _, err = alignkit(*arguments, "--model.tokenizer", bigger[0])
    assert status == 2
    assert "--model.resize_embeddings true" in err.strip().splitlines()[-1]
