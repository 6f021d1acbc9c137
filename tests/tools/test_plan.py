"""Sizes of a run before it runs: against the bytes that the same run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.models.quantize import Int8Linear, NF4Linear
from alignkit.tools.plan.command import (
    _IMPORTED_LATER,
    parse,
    parse_memory,
    plan,
    resident_bytes,
)
from alignkit.tools.plan.packed import SizedInt8, SizedNF4
from alignkit.tools.plan.result import Plan
from alignkit.tools.plan.settings import read_settings
from benchmarks.plan import SHAPES, Case, save_shape

MIB = 2**20
ROOT = Path(__file__).parents[2]


def arguments(base: object, **changes: Any) -> list[str]:
    """The command line of DPO with LoRA over a base, with changes to the model's arguments."""
    model = {"base": str(base), "lora": {"targets": "all-linear"}, **changes}
    config = {
        "model": {"class_path": "alignkit.DPOModule", "init_args": model},
        "data": {
            "class_path": "alignkit.HHPreferenceDataModule",
            "init_args": {"tokens_per_batch": 1024, "max_length": 128},
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    return ["--config", json.dumps(config)]


def planned(base: object, *more: str, **changes: Any) -> Plan:
    return plan(read_settings(parse([*arguments(base, **changes), *more])), 2**34)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("loss", "models"),
    [
        ({"class_path": "WPO", "init_args": {"of": "IPO"}}, 2),
        ({"class_path": "WeightedSum", "init_args": {"terms": ["DPO", "ChosenNLL"]}}, 2),
        ({"class_path": "WeightedSum", "init_args": {"terms": ["SimPO", "ChosenNLL"]}}, 1),
    ],
)
def test_a_loss_inside_a_loss_is_planned(loss: dict[str, Any], models: int, llama: Path) -> None:
    settings = read_settings(parse(arguments(llama, loss=loss)))
    assert settings.reference == ("copy" if models == 2 else "none")


def test_unpaired_answers_are_planned(llama: Path) -> None:
    settings = read_settings(
        parse([
            "--model", "KTOModule", "--model.base", str(llama), "--model.loss.beta", "0.2",
            "--data", "UnpairedDataModule", "--data.path", "rows.jsonl",
        ])
    )  # fmt: skip
    assert settings.reference == "copy"
    assert plan(settings, 2**34).parameters["trained"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "DPOModule", 2048),
        Case("gpt2", "SFTModule", 1024, lora=False),
        Case("gpt_neox", "SFTModule", 3072, checkpointing=True),
    ],
    ids=lambda case: f"{case.shape}-{case.stage}",
)
def test_the_plan_is_what_the_run_takes(case: Case, tmp_path: Path) -> None:
    """The measured process gives blocks of 64 KiB and more back at once, so that its peak is that
    of its tensors; what an allocator holds beside them is luck, for which the plan adds a share.
    """
    base = save_shape(case.shape, tmp_path)
    settings = read_settings(parse(case.arguments(base)))
    ours = plan(settings, 2**34)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--worker"],
        input=json.dumps({"case": case.__dict__, "base": base}),
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    _, step = ours.step(found["tokens"])
    expected = _IMPORTED_LATER + ours.weights.at_rest + step / (1 + ours.slack)
    assert found["peak"] - found["before"] == pytest.approx(expected, rel=0.2)


def test_parameters_and_weights_by_hand(llama: Path) -> None:
    """Width 64, keys 32 wide, MLP 128; r = 8 on every linear layer of two blocks; fp32."""
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    adapters = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    found = planned(llama)
    base = 2 * block + 2 * 512 * 64 + 64
    assert found.parameters == {"base": base, "trained": adapters}
    assert found.weights.trained == found.weights.reference == 4 * adapters
    assert 4 * base <= found.weights.base <= 4 * base + 1024  # rotary frequencies
    assert found.gradients == 4 * adapters
    assert found.states == pytest.approx(2 * 4 * adapters, rel=0.01)  # and step counts


def test_full_training_holds_a_second_model(llama: Path) -> None:
    found = planned(llama, lora=None)
    assert found.parameters["trained"] == found.parameters["base"]
    assert found.weights.reference == found.weights.trained == 4 * found.parameters["base"]


def test_what_saves_memory_does(llama: Path) -> None:
    """Of activations: bf16 about half, checkpointing most; of the base: bf16 half."""
    plain = planned(llama)
    again = planned(llama, activation_checkpointing=True)
    half = planned(llama, "--trainer.precision", "bf16-mixed", dtype="bfloat16")
    assert again.kept.each < 0.2 * plain.kept.each
    assert 0.35 < half.kept.each / plain.kept.each < 0.65
    assert half.weights.base == pytest.approx(plain.weights.base / 2, rel=0.01)
    assert planned(llama, loss={"class_path": "SimPO"}).weights.reference == 0
    assert planned(llama, reference="base").weights.reference == 0


@pytest.mark.parametrize(("sized", "real"), [(SizedNF4, NF4Linear), (SizedInt8, Int8Linear)])
def test_packed_layers_take_what_bitsandbytes_gives(sized: type, real: type) -> None:
    pytest.importorskip("bitsandbytes")
    linear = nn.Linear(320, 192)

    def sizes(layer: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    assert sizes(sized(linear)) == sizes(real(linear))


@pytest.mark.parametrize(("quantize", "bits"), [("nf4", 4.13), ("int8", 8.0)])
def test_weights_are_never_there(tmp_path: Path, quantize: str, bits: float) -> None:
    """Two blocks of a 70B shape, 1.7e9 weights: 7 GB in fp32; this process grows by far less."""
    LlamaConfig(
        vocab_size=512, hidden_size=8192, intermediate_size=28672, num_hidden_layers=2,
        num_attention_heads=64, num_key_value_heads=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    before = resident_bytes()
    found = planned(tmp_path, quantize=quantize)
    assert resident_bytes() - before < 500 * MIB
    linear = 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    rest = found.parameters["base"] - linear
    assert found.weights.base == pytest.approx(linear * bits / 8 + 4 * rest, rel=0.01)


def test_a_proposal_fits_and_a_larger_one_does_not(llama: Path) -> None:
    settings = read_settings(parse(arguments(llama)))
    endless = plan(settings, 2**40)  # planned once: the process itself grows between two plans
    room = endless.peak(2000)
    found = replace(endless, memory=int(room / 0.9) + 1)
    best = found.proposal()
    assert 0 < 2000 - best < 64 and best % 64 == 0
    assert found.peak(best) <= room < found.peak(best + 128)


def test_the_command(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        *arguments(llama),
        "--data.path",
        "nowhere",
        "--memory",
        "2 GiB",
        "--json",
        "plan.json",
    ]
    assert main(["plan", *given]) == 0
    out = capsys.readouterr().out
    assert "data.tokens_per_batch: " in out and "DPOModule" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["device"]["bytes"] == 2**31
    assert found["proposed"]["tokens_per_batch"] % 64 == 0
    parts = ("program", "base", "trained", "reference", "step")
    assert found["bytes"]["peak"] == sum(found["bytes"][part] for part in parts)
    assert main(["plan", *given[:-2], "--memory", "10MB"]) == 0
    assert "no budget fits: one example of 192 tokens takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--memory", "much"], "memory: much is no size; give one such as 24GiB"),
        (["--memory", "0GiB"], "memory: 0GiB is no size"),
        (["--model.base", "no-such-dir/model"], "base 'no-such-dir/model': no such"),
        (["--model.lora.r", "0"], "give a whole number of at least 1"),
        (["--model.lora.targets", "[nothing]"], "nothing"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches=0"),
        (["--model.quantise", "nf4"], "quantise"),
        (["--trainer.strategy", "fsdp2"], "trainer.strategy: plan counts models that"),
        (["--json", "/dev/null/plan.json"], "json"),
    ],
)
def test_mistakes_end_in_one_line(
    given: list[str], line: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments(llama), *given]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and line in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "alignkit plan --config configs/dpo_hh_pythia.yaml --model.quantize nf4" in told


def test_sizes_are_read() -> None:
    assert parse_memory("24GiB") == parse_memory("24G") == 24 * 2**30
    assert parse_memory("80GB") == 80 * 10**9
    with pytest.raises(AlignkitError, match="24 miles is no size"):
        parse_memory("24 miles")


def test_the_demo_is_planned(
    model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(model_dir("llama"))
    for config in sorted((ROOT / "configs" / "demo").glob("*.yaml")):
        extra = [
            "--model.base",
            base,
            "--data.path",
            "nowhere",
            "--model.lora.targets",
            "all-linear",
        ]
        assert main(["plan", "--config", str(config), *extra]) == 0
    assert SHAPES  # the shapes that the benchmark compares
