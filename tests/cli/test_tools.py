"""generate, compare and export on a checkpoint that the command line made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.engine import collate, score
from alignkit.models.checkpoint import load_policy
from tests.cli.test_fit import quick
from tests.modules.helpers import answers


@pytest.fixture
def sft(alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path) -> Path:
    arguments = quick("demo/sft.yaml", model_dir, hh, text, 2)
    assert alignkit(*arguments, "--model.optimizer.lr", 0.05)[0] == 0
    return Path("runs/demo/sft")


def test_generate(sft: Path, alignkit: Callable) -> None:
    common = ["generate", "--model", sft, "--prompts", "Tell me about tea.", "What is salt?"]
    common += ["--max_new_tokens", 8]
    status, first, err = alignkit(*common, "--temperature", 0, "--json", "out.json")
    assert status == 0, err
    assert "Tell me about tea." in first
    _, again, _ = alignkit(*common, "--temperature", 0)
    assert again == first
    _, sampled, _ = alignkit(*common, "--temperature", 1.5, "--top_p", 0.9, "--seed", 3)
    _, same_seed, _ = alignkit(*common, "--temperature", 1.5, "--top_p", 0.9, "--seed", 3)
    assert sampled == same_seed
    assert len(json.loads(Path("out.json").read_text())["answers"]) == 2


def test_compare(sft: Path, alignkit: Callable, model_dir: Callable) -> None:
    status, out, err = alignkit(
        "compare", "--models", f"base={model_dir('llama')}", f"sft={sft}",
        "--prompts", "Tell me about tea.", "--max_new_tokens", 8, "--markdown", "side.md",
    )  # fmt: skip
    assert status == 0, err
    markdown = Path("side.md").read_text()
    for name in ("base", "sft", "Tell me about tea."):
        assert name in out and name in markdown


@pytest.mark.parametrize(
    "command",
    [
        ("export", "--model", "runs/nope", "--output", "out"),
        ("generate", "--model", "runs/nope", "--prompts", "Hi"),
        ("chat", "runs/nope"),
        ("compare", "--models", "a=runs/nope", "--prompts", "Hi"),
        ("judge", "pairs.jsonl", "--model", "runs/nope", "--output", "out.jsonl"),
    ],
    ids=lambda command: command[0],
)
def test_a_missing_model_is_named_by_its_argument(
    command: tuple[str, ...],
    alignkit: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody wrote `base`, and a checkpoint would do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alignkit.models.load.hub_reachable", lambda: False)
    Path("pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n')
    status, _, err = alignkit(*command)
    line = err.strip().splitlines()[-1]
    assert status != 0
    assert "model 'runs/nope': no such local path" in line
    assert "give a checkpoint (.ckpt), a run's folder, an adapter or a model" in line
    assert "base" not in line


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_export(sft: Path, alignkit: Callable, to: str, model_dir: Callable) -> None:
    """What others read scores as the checkpoint does."""
    status, _, err = alignkit("export", "--model", sft, "--output", "out", "--to", to)
    assert status == 0, err
    policy, _ = load_policy(str(sft))
    if to == "merged":
        other = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    else:
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32)
        other = peft.PeftModel.from_pretrained(base, "out").eval()
    row = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(other(row).logits, policy(row).logits, atol=1e-5, rtol=1e-5)
    batch = collate(answers(2))
    assert not torch.equal(
        score(policy, batch), score(load_policy(str(model_dir("llama")))[0], batch)
    )
    status, _, err = alignkit("export", "--model", sft, "--output", "out", "--to", to)
    assert status == 2 and "not empty" in err


def test_audit(alignkit: Callable, hh: Path) -> None:
    status, _, err = alignkit("audit", hh / "train.jsonl", "--json", "audit.json")
    assert status == 0, err
    assert json.loads(Path("audit.json").read_text())["rows"] == 40
