"""``alignkit chat``: adapters of one base in one copy, switched in place."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, adapter_configs, inject_lora, save_adapter
from alignkit.models import load_model
from alignkit.tools.chat.command import Chat, chat
from alignkit.tools.chat.seats import BASE
from alignkit.tools.generate.command import generate
from alignkit.tools.generate.request import printable
from tests.cli.conftest import alignkit, hh, text, workplace  # noqa: F401 (fixtures)
from tests.cli.test_fit import quick

DRAWN = {"max_new_tokens": 10, "temperature": 0.9, "device": "cpu", "seed": 5}


@pytest.fixture
def base(model_dir: Callable[[str], Path]) -> str:
    return str(model_dir("llama"))


@pytest.fixture
def adapters(base: str, tmp_path: Path) -> dict[str, str]:
    """Two adapters that answer otherwise than the base, and than one another."""
    made = {}
    for seed, name in enumerate(("sft", "dpo"), start=1):
        model = inject_lora(load_model(base), LoRAConfig(r=4))
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_" in path:
                    parameter.normal_(std=0.5)
        save_adapter(model, tmp_path / name, base=base)
        made[name] = str(tmp_path / name)
    return made


def say(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], models: list[str], **options: object
) -> Chat:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return chat(models, **{"history": None, **DRAWN, **options})  # type: ignore[arg-type]


def test_adapters_are_switched_in_one_copy_of_the_base(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    base: str,
    adapters: dict[str, str],
) -> None:
    lines = ["Who?"]
    for name in ("dpo", BASE, "sft"):
        lines += ["/reset", f"/model {name}", "Who?"]
    named = [f"{name}={path}" for name, path in adapters.items()]
    talk = say(monkeypatch, lines, named)
    shown = capsys.readouterr().out
    assert len({id(seat.model) for seat in talk.seats.values()}) == 1
    assert len(adapter_configs(talk.seats["sft"].model)) == 2
    wanted = [
        generate(path, prompts="Who?", **{**DRAWN, "seed": 5 + turn})[0]
        for turn, path in enumerate((adapters["sft"], adapters["dpo"], base, adapters["sft"]))
    ]
    assert len(set(wanted)) == 4
    told = [printable(answer).plain for answer in wanted]
    assert shown == (
        f"{told[0]}\nforgotten\nasking dpo\n{told[1]}\nforgotten\nasking base\n{told[2]}\n"
        f"forgotten\nasking sft\n{told[3]}\n"
    )


def test_what_was_said_stays_said_and_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str
) -> None:
    kept = tmp_path / "kept" / "chat.jsonl"
    lines = ["/system Be brief.", "Who?", "", "And why?"]
    talk = say(monkeypatch, lines, [f"it={base}"], history=str(kept))
    turns = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [turn["prompt"] for turn in turns] == ["Who?", "And why?"]
    assert {turn["system"] for turn in turns} == {"Be brief."}
    assert [m["content"] for m in talk.messages[1::2]] == [turn["answer"] for turn in turns]
    first = f"\n\nHuman: Who?\n\nAssistant: {turns[0]['answer']}"
    dialogue = f"{first}\n\nHuman: And why?\n\nAssistant:"
    again = generate(base, prompts=dialogue, system="Be brief.", **{**DRAWN, "seed": 6})
    assert turns[1]["answer"] == again[0]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/model other", "/model other: there are it"),
        ("/modle it", "/modle: no such command; /help lists them"),
    ],
)
def test_mistakes(monkeypatch: pytest.MonkeyPatch, base: str, line: str, told: str) -> None:
    with pytest.raises(AlignkitError, match=told):
        say(monkeypatch, [line], [f"it={base}"])


def test_a_checkpoint_by_the_command(
    alignkit: Callable,  # noqa: F811
    model_dir: Callable,
    hh: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints of two stages share a base; options are checked before anything is loaded."""
    for stage in ("sft", "dpo"):
        assert alignkit(*quick(f"demo/{stage}.yaml", model_dir, hh, text))[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n/model dpo\nWhy?\n/quit\nnever\n"))
    names = ("sft=runs/demo/sft", "dpo=runs/demo/dpo")
    status, out, err = alignkit("chat", *names, "--max_new_tokens", 4, "--top_k", 9)
    assert status == 0, err
    assert "asking dpo" in out
    assert len(Path("chat.jsonl").read_text().splitlines()) == 2
    status, _, err = alignkit("chat", *names, "--top_kk", 9)
    assert status == 2
    assert "did you mean top_k?" in err


def test_a_chat_that_cannot_begin_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "kept" / "chat.jsonl"
    with pytest.raises(AlignkitError, match="no/such"):
        say(monkeypatch, ["Who?"], ["no/such/run"], history=str(kept))
    assert not kept.parent.exists()
