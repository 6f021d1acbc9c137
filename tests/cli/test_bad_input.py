"""Every foreseeable mistake: one clear line, status 2, nothing written over."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import pair, write_lines
from tests.cli.test_fit import quick


@pytest.fixture
def fit(alignkit: Callable, model_dir: Callable, hh: Path, text: Path) -> Callable[..., str]:
    """Run DPO on the demo config with some arguments replaced; return the one line of error."""

    def run(*changes: object, config: str = "demo/dpo.yaml") -> str:
        before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
        status, _, err = alignkit(*quick(config, model_dir, hh, text, 1), *changes)
        assert status == 2
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if "error:" in line.lower()]
        assert len(lines) == 1, err
        assert {p: p.read_bytes() for p in before} == before
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (json.dumps(pair(1)).encode() + b"\n{not json\n", "data.jsonl:2"),
        (json.dumps({"rejected": "\n\nHuman: a\n\nAssistant: b"}).encode(), "data.jsonl:1.*chosen"),
        (json.dumps({"chosen": "hello", "rejected": "hi"}).encode(), "data.jsonl:1.*Assistant:"),
        (json.dumps({"chosen": 3, "rejected": 4}).encode(), "data.jsonl:1"),
        (b'{"chosen": "\xff\xfe"}\n', "data.jsonl:1"),
    ],
    ids=["empty", "not-json", "no-chosen", "no-assistant", "not-text", "not-utf8"],
)
def test_bad_data(fit: Callable, content: bytes, message: str) -> None:
    Path("data.jsonl").write_bytes(content)
    line = fit("--data.path", "data.jsonl")
    assert re.search(message, line), line


def test_truncated_gzip(fit: Callable) -> None:
    whole = gzip.compress(("".join(json.dumps(pair(i)) + "\n" for i in range(200))).encode())
    Path("data.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "data.jsonl.gz" in fit("--data.path", "data.jsonl.gz")


def test_missing_data_file(fit: Callable) -> None:
    line = fit("--data.path", "nowhere/data.jsonl")
    assert "nowhere/data.jsonl" in line


def test_missing_model(fit: Callable) -> None:
    assert "nowhere/model" in fit("--model.base", "./nowhere/model")


def test_unknown_lora_target_lists_candidates(fit: Callable) -> None:
    line = fit("--model.lora.targets", "[q_prj]")
    assert "q_prj" in line and "q_proj" in line


def test_unknown_key(fit: Callable) -> None:
    assert "bta" in fit("--model.bta", 0.1)


def test_unknown_key_in_a_file(fit: Callable) -> None:
    Path("extra.yaml").write_text("model:\n  init_args:\n    bta: 0.1\n")
    assert "bta" in fit("--config", "extra.yaml")


def test_unknown_loss(fit: Callable) -> None:
    line = fit("--model.loss", "SimPo")
    assert "no preference loss 'SimPo'; did you mean SimPO? choose one of AlphaDPO," in line
    Path("extra.yaml").write_text("model:\n  init_args:\n    loss: sigmoid\n")
    assert "did you mean DPO?" in fit("--config", "extra.yaml")
    Path("extra.yaml").write_text("model:\n  init_args:\n    loss:\n      class_path: ipo\n")
    assert "did you mean IPO?" in fit("--config", "extra.yaml")


def test_a_loss_that_is_not_the_modules(fit: Callable) -> None:
    """The configuration's DPO, a flag's, and a reward model's under DPO: what to remove is said."""
    dpo = {"config": "dpo_hh_pythia.yaml"}
    line = fit("--model", "KTOModule", "--data", "UnpairedDataModule", **dpo)
    assert "pythia.yaml: model.loss is DPO, which KTOModule does not take; remove `loss`" in line
    assert "set_parsing_settings" not in line
    line = fit("--model", "RewardModule", "--model.loss.margin", 0.0, **dpo)
    assert "which RewardModule does not take; remove `loss`" in line
    assert "give --model.loss.margin or --model.loss.center" in line
    Path("reward.yaml").write_text(
        "model:\n  class_path: RewardModule\n  init_args: {base: x, loss: {margin: 0.5}}\n"
    )
    line = fit("--config", "reward.yaml", "--model", "DPOModule")
    assert "reward.yaml: model.loss is that of BradleyTerry, which DPOModule does not take" in line
    Path("kto.yaml").write_text("model:\n  class_path: KTOModule\n  init_args: {base: x}\n")
    line = fit("--config", "kto.yaml", "--model.loss", "IPO")
    assert "--model.loss IPO: KTOModule has a loss of its own" in line
    line = fit("--model", "SFTModule", "--data", "SFTDataModule", **dpo)
    assert "pythia.yaml: model.loss: SFTModule takes none; remove `loss` from the file" in line


def test_a_file_of_ones_own_that_is_no_python(
    fit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("broken_file.py").write_text("class Mine(")
    for option in ("--model.loss", "--model"):
        line = fit(option, "broken_file.Mine")
        assert "was never closed (broken_file.py, line 1)" in line
        assert "internal error" not in line


def test_bad_parameter_of_a_loss(fit: Callable) -> None:
    """Values fail before anything is loaded; a loss has its own parameters and no other's."""
    line = fit("--model.loss.beta", -1, "--model.base", "no/such/model")
    assert "model.loss.beta of DPO: must be positive, got -1" in line
    assert "gamma" in fit("--model.loss", "IPO", "--model.loss.gamma", 0.5)
    assert "beta" in fit("--model.loss.beta", "much")


def test_checkpoint_of_another_stage(
    fit: Callable, alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    assert alignkit(*quick("demo/sft.yaml", model_dir, hh, text, 1))[0] == 0
    line = fit("--ckpt_path", "runs/demo/sft")
    assert "SFTModule cannot resume DPOModule" in line and "init_from" in line


def test_checkpoint_of_another_base(
    fit: Callable, alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert alignkit(*quick("demo/sft.yaml", model_dir, hh, text, 1))[0] == 0
    other = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained(model_dir("llama")).save_pretrained("other")
    line = fit("--model.base", "other", "--model.init_from", "runs/demo/sft")
    assert "another base model" in line


def test_missing_checkpoint(fit: Callable) -> None:
    assert "nothing.ckpt" in fit("--model.init_from", "nothing.ckpt")
    assert "nothing.ckpt" in fit("--ckpt_path", "nothing.ckpt")


def test_damaged_checkpoint(fit: Callable) -> None:
    Path("bad.ckpt").write_bytes(b"PK\x03\x04 cut short")
    assert "bad.ckpt" in fit("--ckpt_path", "bad.ckpt")


def test_full_fine_tuning_in_bf16_weights(fit: Callable) -> None:
    assert "master weights" in fit("--model.lora", "null")


def test_sft_data_for_dpo(fit: Callable, workplace: Path) -> None:
    assert "two responses" in fit("--data", "alignkit.HHSFTDataModule")


def test_kto_rows_for_dpo(fit: Callable) -> None:
    write_lines(Path("kto.jsonl"), [{"prompt": "a", "completion": "b", "label": True}] * 4)  # type: ignore[dict-item]
    said = fit("--data.path", "kto.jsonl")
    assert "it is for KTOModule with UnpairedDataModule; mend the row or set data.policies" in said


def test_more_tokens_than_positions(fit: Callable) -> None:
    rows = [{"text": "tea " * 2000}] * 20
    write_lines(Path("long/train.jsonl"), rows)
    write_lines(Path("long/test.jsonl"), rows)
    line = fit("--data.path", "long", "--data.block_size", 1024, config="demo/lora.yaml")
    assert "1024 tokens" in line and "block_size" in line
