"""What `alignkit export` hands over: dtype, files, card, GGUF and the Hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import load_policy
from alignkit.models.gguf_file import GGUF_FILE, write_gguf
from alignkit.models.readback import refuse_other_answers
from alignkit.tools.card import CARD_FILE, base_license
from tests.cli.conftest import hh  # noqa: F401

GREEDY = """
import sys, torch
sys.modules["alignkit"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = AutoTokenizer.from_pretrained(sys.argv[1])("How do I bake bread?", return_tensors="pt")
print(model.generate(**ids, do_sample=False, max_new_tokens=12)[0].tolist())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]) -> Path:
    """A tiny Llama that is stored in bfloat16 and names its licence."""
    directory = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_dir("llama")).save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path, hh: Path) -> Path:  # noqa: F811
    """Two steps of SFT, with a validation."""
    place = tmp_path_factory.mktemp("runs")
    arguments = (
        "--model SFTModule --data HHSFTDataModule --trainer.accelerator cpu --trainer.max_steps 2 "
        "--trainer.limit_val_batches 2 --trainer.log_every_n_steps 1 --data.max_length 256 "
        "--model.optimizer.lr 0.05 --trainer.enable_progress_bar false --trainer.logger "
        f"TensorBoardLogger --trainer.logger.save_dir {place} --trainer.logger.name sft"
    )
    options = ("--model.base", base, "--data.path", hh, "--model.lora.targets", "all-linear")
    assert main(["fit", *arguments.split(), *map(str, options)]) == 0
    return place / "sft"


def export(run: Path, out: Path, *flags: str) -> int:
    return main(["export", "--model", str(run), "--output", str(out), *flags])


def test_a_merged_model_is_in_the_bases_dtype_and_answers_alike(run: Path, tmp_path: Path) -> None:
    """Another interpreter, which cannot import alignkit, continues with the same tokens."""
    assert export(run, tmp_path / "out", "--to", "merged") == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    policy, tokenizer = load_policy(str(run), dtype=torch.bfloat16)
    ids = tokenizer("How do I bake bread?", return_tensors="pt")
    ours = policy.generate(**ids, do_sample=False, max_new_tokens=12)[0].tolist()
    assert json.loads(done.stdout) == ours
    assert export(run, tmp_path / "full", "--to", "merged", "--dtype", "float32") == 0
    assert AutoConfig.from_pretrained(tmp_path / "full").dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dtype", "float16"], "--dtype float16: is for --to merged and gguf, not peft"),
        (["--onto", "original"], "--onto original: is for --to merged and gguf, not peft"),
        (["--to", "merged", "--plain", "true"], "--plain: is for --to peft and safetensors"),
        (["--to", "merged", "--onto", "original"], "was not trained over a quantized base"),
        (["--output", ""], "--output: is empty"),
    ],
)
def test_options_without_use_are_refused(
    run: Path, tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "out", *flags) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_has_no_adapter_to_write(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(base, tmp_path / "out") == 2
    assert "has no adapter for --to peft; export --to merged writes" in capsys.readouterr().err


def test_a_place_is_taken_and_told_as_it_is(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / ("[b] " * 20).strip()))
    assert export(run, Path("~/out")) == 0
    place = Path("~/out").expanduser()
    assert place.is_dir()
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {place} (peft)"


@pytest.mark.parametrize("to", ["merged", "peft", "safetensors", "gguf"])
def test_every_file_is_as_readable_as_the_umask_allows(run: Path, tmp_path: Path, to: str) -> None:
    before = os.umask(0o022)
    try:
        assert export(run, tmp_path / to, "--to", to) == 0
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / to).iterdir()}
    assert set(modes.values()) == {0o644}
    expected = {
        "merged": {"config.json", "generation_config.json", "tokenizer.json"},
        "peft": {"adapter_config.json"},
        "safetensors": {"adapter.safetensors"},
        "gguf": {GGUF_FILE},
    }
    assert {"README.md", "alignkit.json", *expected[to]} <= {*modes}


def test_the_card_says_what_was_trained(run: Path, base: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "mine", "--to", "merged")
    text = (tmp_path / "mine" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "apache-2.0"
    assert header["library_name"] == "transformers"
    assert "base_model" not in header  # a path on this disk is no model's name on the Hub
    assert {"alignkit", "sft"} <= {*header["tags"]}
    assert "trained for 2 steps by `alignkit.modules.sft.SFTModule`" in text
    assert "| val/loss | " in text
    assert "HHSFTDataModule" in text.partition("## Data")[2].partition("##")[0]
    again = yaml.safe_load(
        text.partition("## Train it again")[2].split("```")[1].partition("\n")[2]
    )
    assert again["model"]["init_args"]["base"] == str(base)


def test_a_licence_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    for text in ("", "# No header\n", "---\n- a list\n---\n", "---\n{ not yaml\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert base_license(str(tmp_path)) is None
    assert base_license("org/model-that-is-in-no-cache") is None


def test_gguf_is_read_back_with_its_tokenizer(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "--to", "gguf", "--dtype", "float32") == 0
    options: dict[str, Any] = {"gguf_file": GGUF_FILE}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=GgufConfig(dequantize=True), **options
    ).eval()
    policy, tokenizer = load_policy(str(run))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    for text in ("How do I bake bread?\n\n  Well", "<|endoftext|> 12 naïve 面包"):
        ids = tokenizer(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids
        row = torch.tensor([ids])
        torch.testing.assert_close(again(row).logits, policy(row).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_gguf_of_other_families_says_the_same(
    kind: str, changes: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        kind,
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **changes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    write_gguf(model, AutoTokenizer.from_pretrained(tokenizer_dir), tmp_path / GGUF_FILE, "tiny")
    refuse_other_answers(model, tmp_path, GGUF_FILE)
    row = torch.arange(20)[None] * 11 % 384
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    torch.testing.assert_close(again(row).logits, model(row).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gpt2", {}, "gpt2 is not among llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 16}, "sliding_window"),
        ("qwen3", {"head_dim": 16}, "head_dim"),
    ],
)
def test_gguf_of_what_it_does_not_write_names_the_converter(
    kind: str, changes: dict[str, Any], told: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    sizes = {} if kind == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        **sizes, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with pytest.raises(AlignkitError, match=f"(?s){told}.*convert_hf_to_gguf.py"):
        write_gguf(model, tokenizer, tmp_path / GGUF_FILE, "tiny")


def test_a_written_model_that_answers_otherwise_is_refused(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path)
    with pytest.raises(AlignkitError, match="answers otherwise"):
        refuse_other_answers(model, tmp_path)
    refuse_other_answers(other, tmp_path)


class Hub:
    """Record what would be sent."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails: Exception | None = None

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        if self.fails is not None:
            raise self.fails
        self.calls.append(("files", {"names": {f.name for f in options["folder_path"].iterdir()}}))
        return f"https://hub/{options['repo_id']}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("alignkit.models.hub.hub.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fails", None)
    return Hub


def test_push_sends_the_export_to_a_private_repository(
    run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "out", "--to", "peft", "--push", "me/mine") == 0
    assert hub.calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"README.md", "adapter_config.json"} <= hub.calls[1][1]["names"]
    assert "https://hub/me/mine" in capsys.readouterr().out


def test_a_push_that_cannot_work_is_one_line(
    run: Path,
    tmp_path: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(*flags: str) -> str:
        status = export(run, tmp_path / "out", *flags)
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert status == 2
        return line

    assert "push 'a/b/c'" in told("--push", "a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in told("--push", "me/mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("alignkit.models.hub.hub.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in told("--push", "me/mine")
    assert not (tmp_path / "out").exists()  # found before anything is written
    monkeypatch.setattr("alignkit.models.hub.hub.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "fails", OSError("403 Forbidden: you may not\nmore"))
    line = told("--push", "me/mine")
    assert "403 Forbidden: you may not" in line
    assert "hf upload me/mine" in line
    assert (tmp_path / "out" / "README.md").exists()


def test_the_commands_of_a_card_run_as_they_stand(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "my base's"
    shutil.copytree(base, moved)
    out = tmp_path / "out"
    assert export(run, out, "--to", "safetensors", "--base", str(moved)) == 0
    text = (out / CARD_FILE).read_text(encoding="utf-8")
    program, *command = shlex.split(
        text.partition("```sh\n")[2].partition("```")[0].replace("\\\n", "")
    )
    monkeypatch.chdir(out)
    assert program == "alignkit"
    assert main([*command, "--max_new_tokens", "2"]) == 0
