"""Each notebook runs from top to bottom on a tiny model, and is stored with its outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[1-9]_*.ipynb"))
SHOWN = {
    "1_lora": ("trainable parameters", "held-out loss by step"),
    "2_sft": ("answer:", "| Prompt | base | SFT |"),
    "3_dpo": ("first loss: 0.6931", "| Prompt | SFT | DPO |", "background: rgba("),
    "4_objective": ("tensor([0., 1.])",),
    "5_your_data": ("val/loss", "empty_answers", "identical_pairs"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A tiny Llama with room for the demo's dialogues in a small tokenizer's ids."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    return directory


def shown(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells show, as text."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    texts = [out.get("text", "") for out in outputs]
    data = [value for out in outputs for value in out.get("data", {}).values()]
    return "\n".join(map(str, texts + data))


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == [*SHOWN]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    found = shown(notebook)
    assert not [text for text in SHOWN[path.stem] if text not in found]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "Traceback" not in found
    assert "site-packages" not in found  # warnings, with paths of somebody's machine


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ALIGNKIT_STEPS", "2")
    monkeypatch.setenv("ALIGNKIT_BASE", str(base))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    found = shown(notebook)
    assert not [text for text in SHOWN[path.stem] if text not in found]
