"""How a model was trained to be asked is kept with it, and every later command asks so."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignkit.data import encode_prompt
from alignkit.models.text_format import FORMAT_FILE
from tests.cli.test_fit import quick

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = "Tell me about tea."
DRAWN = ["--max_new_tokens", 8, "--temperature", 0]


@pytest.fixture
def base(model_dir: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template and a BOS that its tokenizer adds."""
    from tokenizers.processors import TemplateProcessing

    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model_dir("llama"), directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    bos = tokenizer.convert_tokens_to_ids("!")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", bos)]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def fit(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, base: Path, workplace: Path
) -> Callable[..., Path]:
    """``fit(stage, *flags)``: train for two steps; the checkpoint, or the status and the error."""

    def run(stage: str, *flags: object, fails: bool = False) -> Any:
        arguments = quick(f"demo/{stage}.yaml", model_dir, hh, text, 2)
        status, _, err = alignkit(
            *arguments, "--model.base", base, "--model.optimizer.lr", 0.05, *flags
        )
        if fails:
            return status, err
        assert status == 0, err
        found = Path(f"runs/demo/{stage}").rglob("last.ckpt")
        return max(found, key=lambda path: path.stat().st_mtime)

    return run


@pytest.fixture
def answer(alignkit: Callable, workplace: Path) -> Callable[..., dict[str, Any]]:
    """``answer(model, *flags)``: what generate writes for one question."""

    def run(model: object, *flags: object, prompt: str = QUESTION) -> dict[str, Any]:
        arguments = ["--model", model, "--prompts", prompt, "--json", "out.json", *DRAWN, *flags]
        status, _, err = alignkit("generate", *arguments)
        assert status == 0, err
        written = json.loads(Path("out.json").read_text())
        return {**written["settings"], "answer": written["answers"][0]["answer"]}

    return run


def rendered(base: Path, question: str = QUESTION) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": question}]
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
        )
    )


def test_a_chat_model_is_asked_by_its_template(
    fit: Callable,
    answer: Callable,
    alignkit: Callable,
    base: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also once the tokenizer's own template has changed, and from both exports."""
    sft = fit("sft", "--data.prompt_format", "chat")
    kept = torch.load(sft, weights_only=True)["text_format"]
    eos = AutoTokenizer.from_pretrained(base).eos_token_id
    assert kept == {
        "prompt_format": "chat",
        "max_length": 128,
        "chat_template": TEMPLATE,
        "system": None,
        "turns": "last",
        "ends": [eos],
    }
    caplog.clear()
    asked = answer(sft)
    assert asked["prompt_format"] == "chat"
    assert not caplog.records
    # The template's text as it is: no BOS of the tokenizer's before it.
    spied = spy_on_ids(answer, sft)
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert spied == ids["input_ids"]

    caplog.clear()
    otherwise = answer(sft, "--prompt_format", "boundary")
    assert otherwise["prompt_format"] == "boundary"
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "trained with prompt_format=chat, asked with prompt_format=boundary" in record.message

    for to in ("peft", "merged"):
        status, _, err = alignkit("export", "--model", sft, "--output", to, "--to", to)
        assert status == 0, err
        assert json.loads(Path(to, FORMAT_FILE).read_text())["text_format"] == kept
        assert answer(to)["answer"] == asked["answer"]
        assert answer(to)["prompt_format"] == "chat"
    assert AutoTokenizer.from_pretrained("merged").chat_template == TEMPLATE

    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}?{% endfor %}"
    tokenizer.save_pretrained(base)
    caplog.clear()
    assert answer(sft) == asked
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "the chat template it was trained with" in record.message


def spy_on_ids(answer: Callable, model: object, **options: Any) -> list[int]:
    """The ids that generation feeds."""
    from alignkit.tools.generate import sampling

    fed: list[list[int]] = []
    original = sampling._complete_batch

    def spy(model: Any, tokenizer: Any, rows: Any, *rest: Any) -> Any:
        fed.extend(rows)
        return original(model, tokenizer, rows, *rest)

    sampling._complete_batch = spy
    try:
        answer(model, **options)
    finally:
        sampling._complete_batch = original
    return fed[0]


def test_compare_asks_each_model_as_it_was_trained(
    fit: Callable, alignkit: Callable, answer: Callable, base: Path
) -> None:
    sft = fit("sft", "--data.prompt_format", "chat")
    lora = fit("lora")
    status, _, err = alignkit(
        "compare", "--models", f"base={base}", f"lora={lora}", f"sft={sft}",
        "--prompts", QUESTION, "--json", "side.json", *DRAWN,
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(Path("side.json").read_text())
    assert {name: how["prompt_format"] for name, how in found["asked"].items()} == {
        "base": "chat",
        "lora": "text",
        "sft": "chat",
    }
    assert found["answers"]["sft"] == [answer(sft)["answer"]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert spy_on_ids(answer, lora) == tokenizer(QUESTION)["input_ids"]
    assert spy_on_ids(answer, base) == encode_prompt(tokenizer, rendered(base), "chat")


def test_a_merged_export_speaks_hhs_form_to_every_reader(
    fit: Callable, alignkit: Callable, answer: Callable
) -> None:
    """Its tokenizer's template gives the ids of training, BOS included, for both HH formats."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi, what is it?"},
        {"role": "user", "content": QUESTION},
    ]
    expected = {
        "boundary": "Be kind.\n\nHuman: Hello\n\nAssistant: Hi, what is it?"
        f"\n\nHuman: {QUESTION}\n\nAssistant:",
        "stripped": "Be kind.\n\nHuman: Hello\n\nAssistant: Hi, what is it?"
        f"\n\nHuman: {QUESTION}\nAssistant: ",
    }
    for prompt_format, text in expected.items():
        sft = fit("sft", "--data.prompt_format", prompt_format)
        alignkit("export", "--model", sft, "--output", prompt_format, "--to", "merged")
        tokenizer = AutoTokenizer.from_pretrained(prompt_format)
        for turns, prompt in ((messages, text), (messages[-1:], None)):
            ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
            if prompt is None:
                assert ids["input_ids"] == spy_on_ids(answer, sft)
            else:
                assert ids["input_ids"] == encode_prompt(tokenizer, prompt, prompt_format)


def test_resuming_with_other_text_is_refused(fit: Callable) -> None:
    sft = fit("sft")
    for flags, told in (
        (("--data.prompt_format", "chat"), "prompt_format=chat instead of boundary"),
        (("--data.max_length", 100), "max_length=100 instead of 128"),
        (("--data.init_args.turns", "all"), "turns=all instead of last"),
    ):
        status, err = fit("sft", *flags, "--ckpt_path", sft, "--trainer.max_steps", 3, fails=True)
        assert status == 2
        assert told in err
        assert len(err.strip().splitlines()) == 1
    fit("sft", "--ckpt_path", sft, "--trainer.max_steps", 3)


def test_other_text_is_told_where_it_is_allowed(
    fit: Callable,
    alignkit: Callable,
    model_dir: Callable,
    hh: Path,
    text: Path,
    base: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Validating, or starting another stage, from weights that know another format."""

    def told() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if "other text" in r.getMessage()]
        caplog.clear()
        return messages

    lora = fit("lora")
    fit("sft", "--model.init_from", lora)
    assert told() == [], "documents have no prompt format to differ from"
    sft = fit("sft", "--data.prompt_format", "chat", "--model.init_from", lora)
    fit("dpo", "--data.prompt_format", "chat", "--model.init_from", sft)
    assert told() == []
    fit("dpo", "--model.init_from", sft)
    (message,) = told()
    assert message.startswith("model.init_from: ")
    assert "prompt_format=boundary instead of chat" in message
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    arguments[0] = "validate"
    status, _, err = alignkit(*arguments, "--model.base", base, "--ckpt_path", sft)
    assert status == 0, err
    (message,) = told()
    assert message.startswith("ckpt_path: ")


def test_the_system_message_of_all_examples_is_used(
    fit: Callable, answer: Callable, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    same, mixed = tmp_path / "same.jsonl", tmp_path / "mixed.jsonl"
    for path, texts in ((same, ["Be kind."] * 30), (mixed, ["Be kind.", "Be brief."] * 15)):
        rows = [
            {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"{QUESTION} {i}"},
                    {"role": "assistant", "content": "It is warm."},
                ]
            }
            for i, system in enumerate(texts)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = fit("sft", "--data.prompt_format", "chat", "--data.path", same)
    asked = answer(sft)
    assert asked["system"] == "Be kind."
    text = f"<system>Be kind.{tokenizer.eos_token}\n" + rendered(base)
    assert spy_on_ids(answer, sft) == encode_prompt(tokenizer, text, "chat")
    caplog.clear()
    assert answer(sft, "--system", "")["system"] is None
    assert "another system message" in caplog.text
    assert answer(fit("sft", "--data.path", mixed))["system"] is None


def test_prompts_longer_than_training_are_told(
    fit: Callable, answer: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    sft = fit("sft")
    caplog.clear()
    answer(sft)
    assert not caplog.records
    answer(sft, prompt="bread and salt " * 40)
    (record,) = caplog.records
    assert "longer than max_length=128, which it was trained with" in record.getMessage()


def test_a_rendered_prompt_is_told(
    fit: Callable, answer: Callable, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft = fit("sft", "--data.prompt_format", "chat")
    caplog.clear()
    answer(sft, prompt=rendered(base))
    assert "pass --raw if it was rendered already" in caplog.text
    caplog.clear()
    assert answer(sft, "--raw", prompt=rendered(base))["answer"] == answer(sft)["answer"]
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    ["[]", '{"text_format": {}}', '{"text_format": {"prompt_format": "x", "max_length": 1}}', "{",
     '{"text_format": {"prompt_format": "chat", "max_length": 1, "new": 2}}'],
)  # fmt: skip
def test_a_bad_format_file_is_one_line(alignkit: Callable, base: Path, content: str) -> None:
    (base / FORMAT_FILE).write_text(content)
    status, _, err = alignkit("generate", "--model", base, "--prompts", "Hi", *DRAWN)
    assert status == 2
    assert FORMAT_FILE in err
    assert len(err.strip().splitlines()) == 1
