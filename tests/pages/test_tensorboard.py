"""What TensorBoard shows of an SFT run and a DPO run, read and photographed in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignkit.cli import main
from tests.pages.browser import Seen, look

pytestmark = pytest.mark.slow
QUESTION = "Why is *bread* better | fresh? " + "Say it at length. " * 12


def fit(stage: str, base: Path, *more: str) -> None:
    """Train for twelve steps, with a validation after every four."""
    arguments = [
        stage, "--base", str(base), "--data", "pairs.jsonl", "--steps", "12", *more,
        "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1",
        "--trainer.val_check_interval", "4", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.enable_progress_bar", "false", "--data.num_workers", "0",
    ]  # fmt: skip
    assert main(arguments) == 0


@pytest.fixture(scope="module")
def address(
    model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """TensorBoard over the runs, at an address of this machine."""
    folder = tmp_path_factory.mktemp("watched")
    rows = [
        {"prompt": f"Tell me about {n}.", "chosen": f"{n} is a number. " * 2, "rejected": "No."}
        for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGNKIT_CACHE", str(folder / "cache"))
        fit("sft", model_dir("llama"))
        fit(
            "dpo", model_dir("llama"), "--init-from", "runs/sft",
            "--trainer.callbacks+=alignkit.SampleAnswers",
            "--trainer.callbacks.prompts", json.dumps([QUESTION]),
            "--trainer.callbacks.max_new_tokens", "48",
        )  # fmt: skip
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"),
               "--host", "127.0.0.1", "--port", "0"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = []
        try:
            for line in server.stderr:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield found[0]
                    break
            else:
                pytest.fail(f"TensorBoard did not start: {''.join(lines)}")
        finally:
            server.terminate()


def watch(address: str, page: str, screenshot: Callable[[str], Path], *awaited: str) -> Seen:
    """Open a page and wait until it holds what the patterns say."""
    seen = look(f"{address}/#{page}", screenshot(f"tensorboard_{page}"), awaited=awaited)
    assert not seen.asked and not seen.broken and seen.colors > 8
    assert "hp_metric" not in seen.text
    return seen


def test_the_first_cards_are_losses(address: str, screenshot: Callable[[str], Path]) -> None:
    seen = watch(address, "timeseries", screenshot, "loss/DPO\n/train", "loss/SFT\n/val", "0.69")
    cards = re.findall(r"^([\w/]+)\n(/\w+)\nAlt \+ Scroll", seen.text, re.M)
    assert ["".join(card) for card in cards[:4]] == [
        "loss/DPO/train", "loss/DPO/val", "loss/SFT/train", "loss/SFT/val",
    ]  # fmt: skip
    groups = re.findall(r"^([a-z]+)(\d+) cards$", seen.text, re.M)
    assert [name for name, _ in groups] == ["loss", "samples", "train", "val"]
    assert "_epoch" not in seen.text


def test_a_chart_holds_training_and_validation(
    address: str, screenshot: Callable[[str], Path]
) -> None:
    curves = r": training and validation\n\d+\nloss\n[-\d.e\s]+Matches \(2\)\n"
    watch(address, "custom_scalars", screenshot, f"DPO{curves}", f"SFT{curves}")


def test_settings_stand_beside_results(address: str, screenshot: Callable[[str], Path]) -> None:
    """Of both stages: those in which the runs differ first, and losses first among the results."""
    seen = watch(address, "hparams", screenshot, "dpo/version_0", "sft/version_0", "loss/SFT/val")
    table = seen.text.rpartition("Show Metrics\n")[2].splitlines()
    start = table.index("dpo/version_0")
    columns, row = table[:start], table[start + 1 :]
    assert {"data", "init_from", "lr"} <= set(columns[:4])
    values = dict(zip(columns, row, strict=False))
    assert values["data"] == "PreferenceDataModule"
    assert float(values["lr"]) == pytest.approx(5e-5)
    assert float(values["loss/DPO/train"]) == pytest.approx(0.69, abs=0.02)
    assert float(values["loss/DPO/val"]) == pytest.approx(0.69, abs=0.02)
    for name in ("val/rewards/accuracies", "val/perplexity", "loss/class_path", "lora/r"):
        assert f"\n{name}\n" in seen.text, "offered as a column"


def test_answers_are_text(address: str, screenshot: Callable[[str], Path]) -> None:
    seen = watch(address, "text", screenshot, "step 12", "Answer")
    assert QUESTION.strip() in seen.text, "as it is, not as Markdown"
    assert len(re.findall(r"^step \d+$", seen.text, re.M)) == 3
