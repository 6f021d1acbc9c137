"""Each script from its command line to its file of numbers, on tiny shapes."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.engine import Example
from tests.benchmarks.conftest import BENCHMARKS

# The peers' libraries warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
Run = Callable[..., tuple[int, dict[str, Any]]]
TRL_RATIOS = {"speed_vs_trl", "speed_vs_trl_tuned", "peak_vs_trl", "peak_vs_trl_tuned"}
LORA_RATIOS = {"step_vs_full", "peak_vs_full", "step_vs_peft", "peak_vs_peft"}


@pytest.mark.parametrize(
    ("script", "unit", "model", "expected"),
    [
        ("dpo.py", "pairs", "tiny-llama-shape", TRL_RATIOS),
        ("sft.py", "samples", "tiny-gpt2-shape", TRL_RATIOS),
        ("lora.py", "rows", "tiny-gpt2-shape", LORA_RATIOS),
    ],
)
def test_arms_agree_and_every_ratio_is_there(
    run_script: Run, tmp_path: Path, script: str, unit: str, model: str, expected: set[str]
) -> None:
    """Two micro-batches a step on alignkit's side, so that its accumulation is part of parity."""
    plot = tmp_path / "plot.png"
    flags = ["--model", model, f"--{unit}-per-step", "4", "--rounds", "1", "--plot", str(plot)]
    flags += ["--parity-steps", "6"]
    if script == "lora.py":
        flags += ["--tokens", "32", "--tokens-per-batch", "64"]
    else:
        flags += ["--tokens-per-batch", "600"]
    code, found = run_script(script, *flags)
    assert code == 0, found["parity"]["failures"]
    assert set(found) == {"ratios", "parity", "arms", "machine"}
    assert set(found["ratios"]) == expected
    assert all(value > 0 for value in found["ratios"].values())
    assert found["parity"]["passed"] and found["parity"]["steps"] == 6
    assert {"cpu", "cores", "ram_gib", "versions", "matmul_flops"} <= set(found["machine"])
    assert "alignkit" in found["arms"] and len(found["arms"]) > 2
    assert all(arm["flop_utilisation"] > 0 for arm in found["arms"].values())
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("balance.py", ["--lengths", "/nowhere.json"]),
        ("balance.py", ["--ranks", "8", "500000"]),
        ("balance.py", ["--ranks", "0"]),
        ("balance.py", ["--grow", "0"]),
        ("soak.py", ["--every", "0"]),
        ("soak.py", ["--ranks", "0"]),
    ],
)
def test_numbers_that_cannot_be_are_one_line(
    script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    message = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert message.startswith(f"error: {flags[0]}") and "\n" not in message


def test_a_disturbed_adapter_trips_the_gate(
    run_script: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run_script(
        "dpo.py", "--model", "tiny-llama-shape", "--pairs-per-step", "2", "--rounds", "1",
        "--perturb", "alignkit",
    )  # fmt: skip
    assert code == 1
    assert not found["parity"]["passed"] and found["parity"]["failures"]
    assert found["ratios"] == {} and found["arms"] == {}
    assert "pairs/s" not in capsys.readouterr().out


def test_scaling_draws_both_curves(run_script: Run, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    code, found = run_script(
        "scaling.py", "--model", "tiny-llama-shape", "--most-pairs", "16", "--longest-row", "512",
        "--tokens-per-batch", "1024", "--plot", str(plot),
    )  # fmt: skip
    assert code == 0
    curves = found["curves"]
    assert [point["pairs_per_step"] for point in curves["pairs_per_step"]] == [8, 16]
    assert [point["tokens_per_batch"] for point in curves["row_tokens"]] == [256, 512]
    for point in (*curves["pairs_per_step"], *curves["row_tokens"]):
        assert point["longest_row_tokens"] >= point["mean_row_tokens"]
    assert plot.stat().st_size > 1000


def test_ranked_answers_with_shared_prompts_and_apart(run_script: Run) -> None:
    code, found = run_script(
        "ranked.py", "--model", "tiny-llama-shape", "--prompts", "3", "--answers", "4",
        "--tokens-per-batch", "1024", "--rounds", "1",
    )  # fmt: skip
    assert code == 0
    assert found["tokens"]["shared"] < found["tokens"]["apart"]
    assert found["speed"] > 0 and found["loss_difference"] < 0.01


def test_the_reference_live_and_from_the_cache(run_script: Run) -> None:
    code, found = run_script(
        "reference.py", "--model", "tiny-llama-shape", "--pairs", "8", "--tokens-per-batch", "1024",
        "--longest-row", "2048", "--rounds", "1",
    )  # fmt: skip
    assert code == 0
    assert [point["tokens_per_batch"] for point in found["rows"]] == [256, 512, 1024, 2048]
    lengths = [point["mean_row_tokens"] for point in found["rows"]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert all(point["microseconds_per_token"] > 0 for point in found["rows"])
    assert set(found["seconds_per_pair"]) == {"live", "cached"}
    assert found["cached_speed"] > 0
    assert found["policy_row_tokens"] <= 1024


def test_the_road_beside_trl(run_script: Run, tmp_path: Path) -> None:
    """Both libraries' own numbers, step by step and held out; they agree in fp32."""
    plot = tmp_path / "road.png"
    code, found = run_script(
        "road.py", "--model", "tiny-llama-shape", "--steps", "6", "--pairs", "2",
        "--held-out", "8", "--every", "3", "--plot", str(plot),
    )  # fmt: skip
    assert code == 0
    curves = found["curves"]["alignkit"]
    assert list(curves["loss"]) == [str(step) for step in range(1, 7)]
    assert list(curves["val/rewards/accuracies"]) == ["3", "6"]
    assert curves["loss"]["1"] == pytest.approx(0.6931, abs=1e-4)
    assert curves["rewards/margins"]["6"] != 0
    apart = found["largest_differences"]
    assert apart.pop("rewards/accuracies") == 0.5  # before the first step all pairs tie
    assert max(apart.values()) < 1e-4
    assert plot.stat().st_size > 1000


def test_arms_are_compared_in_fp32(run_script: Run) -> None:
    """Where bf16 has no instructions: the arms that are timed are those whose parity is judged."""
    code, found = run_script(
        "dpo.py", "--model", "tiny-llama-shape", "--precision", "32-true", "--rounds", "1",
        "--pairs-per-step", "2", "--parity-steps", "3",
    )  # fmt: skip
    assert code == 0 and found["parity"]["bf16"] == {}
    assert found["parity"]["fp32"]["losses_max_relative"] < 1e-3
    assert set(found["ratios"]) == TRL_RATIOS and found["machine"]["matmul_dtype"] == "float32"
    code, found = run_script(
        "dpo.py", "--model", "tiny-llama-shape", "--precision", "32-true", "--rounds", "1",
        "--pairs-per-step", "2", "--parity-steps", "2", "--perturb", "trl_tuned",
    )  # fmt: skip
    assert code == 1 and all("trl_tuned" in line for line in found["parity"]["failures"])


def test_what_a_wide_residual_stream_costs(
    run_script: Run, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    """Operators outside products take time in both arms; with bf16 units, whole steps do."""
    row = {name: f"\n\nHuman: How?\n\nAssistant: {name}." for name in ("chosen", "rejected")}
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(4 * (json.dumps(row) + "\n"))
    code, found = run_script(
        "residual.py", "--base", str(model_dir("llama")), "--data", str(tmp_path), "--pairs", "4",
        "--rounds", "2",
    )  # fmt: skip
    assert code == 0 and found["tokens"] > 0
    for kind in ("products", "outside") if found["emulated"] else ("whole",):
        assert min(found[kind]["seconds"].values()) > 0
        assert set(found[kind]["ratio"]) == {"residual", "logits", "both"}
        for arm, (low, high) in found[kind]["ratios"].items():
            assert low <= found[kind]["ratio"][arm] <= high


def test_mistakes_are_one_line(run_script: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, part in (
        (["--model", "gpt9-shape"], "gpt9-shape"),
        (["--rounds", "0"], "--rounds"),
        (["--parity-steps", "0"], "--parity-steps"),
        (["--model", "tiny-llama-shape", "--data", "x.jsonl"], "--tokenizer"),
        (["--model", "tiny-llama-shape", "--data", "x.jsonl", "--tokenizer", "no/such"], "no/such"),
    ):
        code, _ = run_script("dpo.py", *flags)
        message = capsys.readouterr().err.strip()
        assert code == 2 and message.startswith("error: ") and part in message


def test_an_arm_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The one test that pays for a process: load, one turn of two steps, end."""
    from sidebyside.job import Arm, Job
    from sidebyside.plan import OURS
    from sidebyside.runner import Worker
    from sidebyside.setup import write_adapter, write_examples
    from sidebyside.shapes import SHAPES, targets_of, write_random_model

    from alignkit.lora import LoRAConfig

    config = SHAPES["tiny-gpt2-shape"]
    lora = LoRAConfig(targets=targets_of(config))
    write_random_model("tiny-gpt2-shape", tmp_path / "model", seed=0)
    write_adapter(config, lora, tmp_path / "adapter", seed=0)
    pairs = [Example([1, 2, 3], [[4, 5], [6, 7, 8]]), Example([9], [[10], [11]])]
    job = Job(
        arm=Arm(OURS, "alignkit"),
        task="dpo",
        model=str(tmp_path / "model"),
        tokenizer=str(tmp_path / "model"),
        adapter=str(tmp_path / "adapter"),
        lora=lora.to_dict(),
        examples=write_examples(pairs, tmp_path / "examples.json"),
        scored=[0, 1],
        steps=[[0, 1]] * 3,
    )
    with Worker(job, tmp_path / "log") as worker:
        taken = worker.ready().take(2)
    assert len(worker.logps) == 4 and all(logp < 0 for logp in worker.logps)
    assert taken.losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference agree
    assert taken.seconds > 0 and taken.total_bytes > worker.loaded_bytes > 50e6
