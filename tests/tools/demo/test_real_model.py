"""What runs on SmolLM2 itself: unpacking it, and the notebooks from top to bottom."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from alignkit.errors import AlignkitError
from alignkit.models import load_model, load_tokenizer
from alignkit.tools.demo.model import find_gguf, prepare_model
from tests.test_notebooks import SHOWN, shown

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the demo's model in it."""
    pytest.importorskip("gguf")
    try:
        find_gguf()
    except AlignkitError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("runs")
    prepare_model(directory / "model")
    return directory


@pytest.mark.slow
def test_the_model_is_unpacked_once_and_knows_english(runs: Path) -> None:
    assert [path.name for path in runs.iterdir()] == ["model"]
    config = runs / "model" / "config.json"
    written = config.stat().st_mtime_ns
    assert prepare_model(runs / "model") == runs / "model"
    assert config.stat().st_mtime_ns == written

    model, tokenizer = load_model(str(runs / "model")), load_tokenizer(str(runs / "model"))
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is Paris, and that of Italy is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Rome"


@pytest.mark.parametrize("script", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_is_what_its_script_says(script: Path) -> None:
    written = jupytext.read(script).cells
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells
    assert [(c.cell_type, c.source) for c in stored] == [(c.cell_type, c.source) for c in written]
    assert not any(out.output_type == "error" for c in stored for out in c.get("outputs", []))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_small_notebook_runs_on_it(
    name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(runs / "model")
    monkeypatch.setenv("ALIGNKIT_RUNS", str(tmp_path))
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ALIGNKIT_STEPS", "2")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    found = shown(notebook)
    assert not [text for text in SHOWN[name] if text not in found]


@pytest.mark.slow
def test_the_notebook_walks_the_three_stages(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_RUNS", str(runs))
    monkeypatch.setenv("ALIGNKIT_CACHE", str(runs / "cache"))
    monkeypatch.setenv("ALIGNKIT_STEPS", "1")
    notebook = nbformat.read(NOTEBOOKS / "three_stages.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()

    for name in ("lora", "sft", "dpo", "hinge"):
        assert (runs / f"{name}.ckpt").is_file()
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) == 3
    (table,) = (data["text/markdown"] for data in shown if "text/markdown" in data)
    assert table.startswith("| Prompt | SFT | DPO |")
