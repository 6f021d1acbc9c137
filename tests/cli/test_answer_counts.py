"""Rows with another number of answers than the loss takes are refused before any step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.test_one_line import one_error


def write(path: Path, counts: Sequence[int]) -> None:
    rows = [
        {"prompt": f"Why {n}?", "responses": [f"Because {n} {i}." for i in range(count)]}
        for n, count in enumerate(counts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("odd", "model", "said"),
    [
        ("train", ["--model", "DPOModule"], "has 3 answers: DPO needs exactly two"),
        ("validation", ["--model", "DPOModule"], "has 3 answers: DPO needs exactly two"),
        ("train", ["--model", "RewardModule", "--model.loss.margin", 0.5], "margin exactly two"),
        ("validation", ["--model", "DPOModule", "--model.loss", "PlackettLuce"], ""),
        ("train", ["--model", "RewardModule"], ""),
        ("validation", ["--model", "DPOModule", "--trainer.limit_val_batches", 0], ""),
    ],
)
def test_a_row_with_more_answers(
    odd: str,
    model: list[object],
    said: str,
    alignkit: Callable,
    model_dir: Callable,
    workplace: Path,
) -> None:
    """Named by file and line, in the training or the held-out rows; no step is taken."""
    Path("rows").mkdir()
    for split in ("train", "validation"):
        write(Path("rows", f"{split}.jsonl"), [2, 2, 3, 2] if split == odd else [2, 2, 2, 2])
    status, _, err = alignkit(
        "fit", *model, "--model.base", model_dir("gpt2"), "--data", "PreferenceDataModule",
        "--data.path", "rows", "--data.examples_per_batch", 1, "--trainer.max_steps", 4,
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    if not said:
        assert status == 0, err
        return
    assert status == 2
    line = one_error(err)
    assert f"rows/{odd}.jsonl:3: has 3 answers: " in line and said in line
    assert "step 1/" not in err and not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("DPOModule", "UnpairedDataModule", "DPO compares the answers to a prompt"),
        ("RewardModule", "UnpairedDataModule", "BradleyTerry compares the answers to a prompt"),
        ("SFTModule", "UnpairedDataModule", "SFTModule imitates every answer"),
        ("SFTModule", "PreferenceDataModule", "SFTModule imitates every answer"),
        ("LoRAModule", "PreferenceDataModule", "use SFTDataModule, which takes the chosen ones"),
    ],
)
def test_data_of_another_stage(
    model: str, data: str, said: str, alignkit: Callable, model_dir: Callable, workplace: Path
) -> None:
    """They would train on answers that nobody prefers."""
    pair = data == "PreferenceDataModule"
    rows = [
        {"prompt": f"Why {n}?", "chosen": f"{n}.", "rejected": "No."}
        if pair
        else {"prompt": f"Why {n}?", "completion": f"{n}.", "label": n % 2 == 0}
        for n in range(80)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = alignkit(
        "fit", "--model", model, "--model.base", model_dir("gpt2"), "--data", data,
        "--data.path", "rows.jsonl", "--trainer.max_steps", 1, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert status == 2
    assert said in one_error(err)
