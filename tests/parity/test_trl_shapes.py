"""Rows in the shapes people publish: alignkit's token ids beside the installed trl's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

pytest.importorskip("trl", reason="trl is not installed")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "shapes.py"
AFTER = "trl scores '\\n' after the turn's end"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

EXPECTED = {
    "alpaca.json": {f"the same ids, but {AFTER}": 50},
    # trl trains every token of a conversation, and on answers that are marked as unwanted.
    "kto_messages.json": {
        f"the same ids, but {AFTER} and trl scores the prompt": 25,
        "alignkit leaves it out": 25,
    },
    "sharegpt_preference.json": {f"the same ids, but {AFTER}": 50},
    "sharegpt_tools.json": {f"the same ids, but {AFTER} and trl scores the prompt": 50},
    "ultrafeedback.jsonl": {f"the same ids, but {AFTER}": 50},
}


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_ids_of_every_row(
    name: str, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They differ in what trl scores beside the answer: the line break behind it, the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    compare: Callable[..., dict[str, int]] = runpy.run_path(str(SCRIPT))["compare"]
    found = compare(real_data / "data" / "shapes" / name, tokenizer, 3)
    assert found == EXPECTED[name]
    printed = capsys.readouterr().out
    assert printed.count("alignkit prompt [") == printed.count("trl      prompt [") >= 1
