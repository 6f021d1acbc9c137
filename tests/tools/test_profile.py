"""The profile of full fine-tuning against LoRA: what is measured, how it is put together."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.tools.profile import command as profile_module
from alignkit.tools.profile.command import profile
from alignkit.tools.profile.result import Profile
from alignkit.tools.profile.step import Measurement, Setup, measure
from alignkit.utils.memory import peak_bytes, reset_peak

MIB = 2**20


def setup(base: Path, lora: LoRAConfig | None, **changes: Any) -> Setup:
    values = {"random_init": True, "mixed": True, "rows": 2, "tokens": 16, "steps": 2}
    values |= {"device": "cpu", **changes}
    return Setup(base=str(base), lora=lora and lora.to_dict(), **values)


@pytest.mark.parametrize("mixed", [True, False])
def test_a_setup_is_measured(model_dir: Callable[[str], Path], mixed: bool) -> None:
    """Tiny GPT-2, width 32: c_attn is 32 → 96, c_proj 32 → 32, two blocks, r = 8."""
    base = model_dir("gpt2")
    full = measure(setup(base, None, mixed=mixed))
    lora = measure(setup(base, LoRAConfig(targets=("attn.c_attn", "attn.c_proj")), mixed=mixed))
    assert full.trainable_parameters == full.base_parameters == lora.base_parameters
    assert lora.trainable_parameters == 2 * 8 * (32 + 96 + 32 + 32)
    for found in (full, lora):
        assert min(found.forward, found.backward, found.optimizer) > 0
        assert found.step >= max(found.forward, found.backward)


def test_a_row_longer_than_the_context_is_refused(model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(AlignkitError, match="tokens: 513 passes the model's context of 512"):
        measure(setup(model_dir("gpt2"), None, tokens=513))


def test_the_peak_counts_what_is_gone_again() -> None:
    """64 MiB come and go between the reset and the reading; a later reset forgets them."""
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_bytes(cpu)
    torch.ones(16 * MIB).sum()
    assert 60 * MIB < peak_bytes(cpu) - before < 80 * MIB
    reset_peak(cpu)
    assert peak_bytes(cpu) - before < 30 * MIB


def measurement(step: float, peak: int = 100 * MIB, trainable: int = 1000) -> Measurement:
    return Measurement(1000, trainable, step / 4, step / 2, step / 4, step, peak)


def test_rounds_alternate_and_ratios_are_paired(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Full takes 1, 2, 4 s and LoRA 0.5, 1.5, 2 s: medians 2 and 1.5, but the ratios are
    0.5, 0.75, 0.5, so 0.5: a machine that slows down slows both sides of a pair."""
    times = {"full": iter([1.0, 2.0, 4.0]), "lora": iter([0.5, 1.5, 2.0])}
    order = []

    def run(name: str, given: Setup) -> Measurement:
        assert (given.lora is None) == (name == "full")
        order.append(name)
        if name == "full":
            return measurement(next(times[name]))
        return measurement(next(times[name]), peak=25 * MIB, trainable=10)

    monkeypatch.setattr(profile_module, "_run_process", run)
    paths = {kind: tmp_path / f"new/p.{kind}" for kind in ("md", "json", "png")}
    result = profile(
        "model",
        device="cpu",
        rounds=3,
        markdown=str(paths["md"]),
        json=str(paths["json"]),
        plot=str(paths["png"]),
    )
    assert order == ["full", "lora", "lora", "full", "full", "lora"]
    assert result.setups["full"].step == 2.0
    assert result.setups["lora"].step == 1.5
    assert result.ratios["step"] == 0.5
    assert result.ratios["peak"] == 0.25
    markdown = paths["md"].read_text(encoding="utf-8")
    assert "| trainable parameters | 1,000 | 10 | 0.0100 |" in markdown
    assert "| step (ms) | 2000.0 | 1500.0 | 0.50 |" in markdown
    assert "| peak memory (MiB) | 100 | 25 | 0.25 |" in markdown
    assert markdown.splitlines()[-1].startswith("model (1,000 parameters), 4 × 256 tokens")
    assert json.loads(paths["json"].read_text())["ratios"]["step"] == 0.5
    with Image.open(paths["png"]) as picture:
        assert picture.size[0] > 2 * picture.size[1]


def test_in_processes_of_their_own(
    model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = profile(
        str(model_dir("gpt2")),
        lora=LoRAConfig(r=2, targets=("attn.c_attn", "attn.c_proj")),
        random_init=True,
        rows=1,
        tokens=16,
        steps=1,
        rounds=1,
        device="cpu",
    )
    assert isinstance(result, Profile)
    assert result.setups["lora"].trainable_parameters == 2 * 2 * (32 + 96 + 32 + 32)
    assert result.setups["full"].peak_bytes > 0
    assert "Full fine-tuning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "output", "errors", "message"),
    [
        (2, '{"error": "base \'x\': no such file"}', "noise", "^base 'x': no such file$"),
        (-9, "", "", r"Full fine-tuning failed \(killed, likely out of memory\); try fewer rows"),
        (1, "", "Traceback\nRuntimeError: boom", r"failed \(RuntimeError: boom\)"),
    ],
)
def test_a_failed_process_is_one_line(
    monkeypatch: pytest.MonkeyPatch, code: int, output: str, errors: str, message: str
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AlignkitError, match=message) as error:
        profile("x", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: must be 1 or more, got 0"),
        ({"tokens": 1}, "tokens: must be 2 or more, got 1"),
        ({"base": None}, "base: none was given; pass --base"),
        ({"precision": "16-mixed"}, "precision: 16-mixed is not profiled; pass --precision 32"),
        ({"rounds": 0}, "rounds: must be 1 or more"),
        ({"plot": "."}, r"plot '\.': is a directory"),
    ],
)
def test_bad_options_start_no_process(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(profile_module, "_run_process", lambda *_: pytest.fail("it ran"))
    with pytest.raises(AlignkitError, match=message):
        profile(**{"base": "x", "device": "cpu", **options})


CONFIG = """
trainer: {precision: 32-true, max_epochs: 1}
model:
  class_path: alignkit.LoRAModule
  init_args:
    base: some/model
    lora: {r: 4, targets: [q_proj, v_proj]}
data:
  class_path: alignkit.OpenWebTextDataModule
  init_args: {block_size: 64}
"""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """The setups that would have run."""
    setups: list[Setup] = []

    def run(name: str, given: Setup) -> Measurement:
        setups.append(given)
        return measurement(1.0)

    monkeypatch.setattr(profile_module, "_run_process", run)
    return setups


def test_a_training_config_is_profiled_and_flags_beat_it(
    recorded: list[Setup], tmp_path: Path
) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    parser = ArgumentParser(exit_on_error=False)
    profile_module.add_arguments(parser)
    flags = ["--config", str(config), "--rounds", "1", "--device", "cpu"]
    for extra in ([], ["--tokens", "32", "--lora.targets", "[c_attn]", "--random_init", "true"]):
        profile(**parser.instantiate(parser.parse_args([*flags, *extra])).as_dict())
    full, lora, _, other = recorded
    assert (full.base, full.lora, full.mixed, full.tokens) == ("some/model", None, False, 64)
    assert lora.lora == LoRAConfig(r=4, targets=("q_proj", "v_proj")).to_dict()
    assert other.lora == LoRAConfig(targets=("c_attn",)).to_dict()
    assert (other.base, other.tokens, other.random_init) == ("some/model", 32, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"c\.yaml: No such file"),
        ("model: [", r"c\.yaml:1: is not valid YAML"),
        ("- 1", r"c\.yaml: holds a list"),
        ("model: gpt2", r"c\.yaml: model holds no keys"),
        ("modle: {}", r"c\.yaml: modle: no such option; did you mean model"),
        ("trainer: {precisoin: 32-true}", r"c\.yaml: trainer.precisoin: .* mean precision"),
        ("model: {init_args: {bas: x}}", r"c\.yaml: model.bas: .* mean base"),
        ("model: {init_arg: {base: x}}", r"c\.yaml: model.init_arg: .* mean init_args"),
        ("data: {init_args: {block_sise: 8}}", r"c\.yaml: data.block_sise: no such option"),
        ("model: {init_args: {base: x, lora: null}}", r"model\.lora is None; set the adapter"),
        ("model: {init_args: {base: x, lora: {rank: 1}}}", "LoRAConfig: unknown keys rank"),
        ("trainer: {precision: bf16-true}\nmodel: {init_args: {base: x}}", "bf16-true is not"),
        ("seed_everything: 1", "base: none was given"),
    ],
)
def test_bad_configs(
    recorded: list[Setup], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(AlignkitError, match=message) as error:
        profile(config=str(path), device="cpu")
    assert "\n" not in str(error.value)
    assert not recorded
