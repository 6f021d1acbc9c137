"""Rows of each shape that people publish train a chat model with no flag but the path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.cli.test_fit import CONFIGS
from tests.data.test_encode import TEMPLATE

SHAPES = {
    "alpaca.json": "sft",
    "kto_messages.json": "sft",
    "sharegpt_preference.json": "dpo",
    "sharegpt_tools.json": "sft",
    "ultrafeedback.jsonl": "dpo",
}


@pytest.mark.parametrize("name", SHAPES)
def test_two_steps_on_real_rows(
    name: str,
    real_data: Path,
    alignkit: Callable,
    model_dir: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The checkpoint keeps the template that ``auto`` chose."""
    base = tmp_path_factory.mktemp("base") / "chat"
    shutil.copytree(model_dir("llama"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    config = base / "config.json"
    shape = json.loads(config.read_text())
    config.write_text(json.dumps(shape | {"max_position_embeddings": 4096}))
    stage = SHAPES[name]
    status, _, err = alignkit(
        "fit", "--config", CONFIGS / f"demo/{stage}.yaml",
        "--model.base", base,
        "--data.path", real_data / "data/shapes" / name,
        "--data.max_length", 4000,
        "--trainer.max_steps", 2,
        "--trainer.limit_val_batches", 1,
        "--trainer.val_check_interval", 1,
        "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    assert status == 0, err
    (last,) = Path(f"runs/demo/{stage}").rglob("last.ckpt")
    kept = torch.load(last, weights_only=True)["text_format"]
    assert (kept["prompt_format"], kept["chat_template"]) == ("chat", TEMPLATE)
