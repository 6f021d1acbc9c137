"""Answers that are logged while a model trains."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkit import SampleAnswers
from alignkit.cli import main
from alignkit.errors import AlignkitError
from tests.tools.test_judge import ROWS


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def fit(base: Path, data: Path, out: str, *more: Any) -> Path:
    """Train for four steps, with a validation after two."""
    assert main([str(each) for each in (
        "fit", "--model", "DPOModule", "--model.base", base, "--data", "PreferenceDataModule",
        "--data.path", data, "--data.tokens_per_batch", 256, "--trainer.max_steps", 4,
        "--trainer.val_check_interval", 2, "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", 1, "--model.optimizer", "AdamW",
        "--model.optimizer.lr", 0.05, "--trainer.logger", "TensorBoardLogger",
        "--trainer.logger.save_dir", out, "--trainer.enable_progress_bar", "false", *more,
    )]) == 0  # fmt: skip
    return next(Path(out).rglob("version_0"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = max(run.rglob("*.ckpt"), key=lambda each: each.stat().st_mtime)
    return dict(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")  # in TensorBoard
def test_answers_are_logged_and_training_is_the_same(
    model_dir: Callable,
    pairs: Path,
    tmp_path: Path,
) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    base = model_dir("llama")
    more = ["--trainer.callbacks+=alignkit.SampleAnswers", "--trainer.callbacks.prompts",
            '["Why is *the* sky ~blue~ | $2$?", "How?"]', "--trainer.callbacks.max_new_tokens", 5,
            "--trainer.callbacks.temperature", 1]  # fmt: skip
    plain, asked = fit(base, pairs, "plain"), fit(base, pairs, "asked", *more)
    without, found = weights(plain), weights(asked)
    assert without.keys() == found.keys()
    assert all(torch.equal(without[name], found[name]) for name in found)

    events = EventAccumulator(str(asked), size_guidance={"tensors": 0}).Reload()
    for name in ("repetition", "run_on", "ended", "empty", "tokens"):
        points = events.Scalars(f"samples/{name}")
        assert [point.step for point in points] == [2, 4]
    assert all(0 <= point.value <= 5 for point in events.Scalars("samples/tokens"))
    texts = [each.tensor_proto.string_val[0].decode() for each in
             events.Tensors("samples/text_summary")]  # fmt: skip
    assert len(texts) == 2
    shown = html.unescape(markdown_to_safe_html(texts[0]))
    assert "<td>Why is *the* sky ~blue~ | $2$?</td>" in shown, "as it is, not as Markdown"
    assert shown.count("<td>") == 4 and "<pre>" not in shown, "long answers are wrapped"
    assert texts[0] != texts[1], "the model has moved"
    assert "samples/text_summary" not in EventAccumulator(str(plain)).Reload().Tags()["tensors"]


def test_every_n_steps(model_dir: Callable, pairs: Path) -> None:
    more = ["--trainer.callbacks+=alignkit.SampleAnswers", "--trainer.callbacks.data", pairs,
            "--trainer.callbacks.limit", 3, "--trainer.callbacks.every_n_steps", 3,
            "--trainer.callbacks.max_new_tokens", 2]  # fmt: skip
    run = fit(model_dir("gpt2"), pairs, "runs", *more)
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    assert [point.step for point in events.Scalars("samples/ended")] == [3, 4]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [f"Say {n}." in text for n in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "prompts: none was given"),
        ({"prompts": ["Hi"], "limit": 0}, "SampleAnswers: limit must be 1 or more, got 0"),
        ({"prompts": ["Hi"], "every_n_steps": -1}, "every_n_steps must be 1 or more, got -1"),
        ({"prompts": ["Hi"], "temperature": -1}, "temperature: must be 0 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(AlignkitError, match=line):
        SampleAnswers(**arguments)


def test_a_sharded_model_is_refused(
    model_dir: Callable,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main([
        "fit", "--model", "SFTModule", "--model.base", str(model_dir("llama")), "--data",
        "SFTDataModule", "--data.path", str(pairs), "--trainer.max_steps", "1",
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "fsdp2",
        "--trainer.callbacks+=alignkit.SampleAnswers", "--trainer.callbacks.prompts", '["Hi"]',
        "--trainer.logger", "false",
    ])  # fmt: skip
    assert status == 2
    assert "SampleAnswers: rank 0 holds only a part" in capsys.readouterr().err
