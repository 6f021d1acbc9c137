"""The functions behind ``alignkit generate`` and ``alignkit compare``, flags included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, save_adapter
from alignkit.models import load_model, load_tokenizer
from alignkit.tools import compare as compare_module
from alignkit.tools.compare import compare
from alignkit.tools.comparison import Comparison
from alignkit.tools.generate import command as generate_module
from alignkit.tools.generate.command import generate
from alignkit.tools.generate.pieces import Pieces
from alignkit.tools.generate.request import Request, printable
from alignkit.tools.generate.sampling import Sampling, complete
from alignkit.tools.naming import name_models

SHORT = {"max_new_tokens": 8, "temperature": 0.0, "device": "cpu"}


def as_dialogue(question: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant:"


@pytest.fixture
def base(model_dir: Callable[[str], Path]) -> str:
    return str(model_dir("gpt2"))


def test_generate_prints_and_saves_what_the_model_says(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "answers.json"
    answers = generate(base, prompts=["Why?", "[bold]How?"], json=str(output), **SHORT)
    sampling = Sampling(temperature=0, max_new_tokens=8, stop="\n\nHuman:")
    texts = [as_dialogue("Why?"), as_dialogue("[bold]How?")]
    assert answers == list(complete(load_model(base), load_tokenizer(base), texts, sampling))
    printed = capsys.readouterr().out
    assert "Why?" in printed
    assert "[bold]How?" in printed, "a prompt is text, not markup"
    saved = json.loads(output.read_text(encoding="utf-8"))
    assert saved["answers"] == [
        {"prompt": "Why?", "answer": answers[0]},
        {"prompt": "[bold]How?", "answer": answers[1]},
    ]
    assert saved["settings"]["temperature"] == 0
    assert saved["settings"]["repetition_penalty"] == 1.1


def test_an_adapter_answers_otherwise_than_its_base(base: str, tmp_path: Path) -> None:
    model = inject_lora(load_model(base), LoRAConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, tmp_path)
    answers = generate(str(tmp_path), base=base, prompts="Why?", **SHORT)
    text = as_dialogue("Why?")
    sampling = Sampling(temperature=0, max_new_tokens=8, stop="\n\nHuman:")
    assert answers == list(complete(model, load_tokenizer(base), [text], sampling))
    assert answers != generate(base, prompts="Why?", **SHORT)


def test_raw_prompts_are_given_as_they_are(base: str) -> None:
    dialogue = generate(base, prompts="Why?", **SHORT)
    assert generate(base, prompts=as_dialogue("Why?"), raw=True, **SHORT) == dialogue
    assert generate(base, prompts="Why?", raw=True, **SHORT) != dialogue


def parse(module: ModuleType, args: list[str]) -> dict[str, Any]:
    parser = ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return dict(vars(parser.parse_args(args)))


def test_generate_flags(base: str, tmp_path: Path) -> None:
    """Prompts that read as YAML are text; options shared with compare are flags of their own."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("Who?\n", encoding="utf-8")
    args = ["--model", base, "--prompts", "What: is it?", "[1]", "null", "--temperature", "0"]
    args += ["--prompts_file", str(prompts), "--max_new_tokens", "8", "--device", "cpu"]
    answers = generate_module.generate(**parse(generate_module, args))
    prompts_given = ["What: is it?", "[1]", "null", "Who?"]
    assert answers == generate(base, prompts=prompts_given, **SHORT)
    raw = generate_module.generate(**parse(generate_module, [*args, "--raw"]))
    assert raw == generate(base, prompts=prompts_given, raw=True, **SHORT)


def test_compare_flags(base: str) -> None:
    args = ["--models", f"a={base}", f"b={base}", "--prompts", "Why?", "--max_new_tokens=8"]
    comparison = compare_module.compare(**parse(compare_module, [*args, "--temperature=0"]))
    assert list(comparison.answers) == ["a", "b"]
    assert comparison.answers["a"] == generate(base, prompts="Why?", **SHORT)


@pytest.mark.parametrize("module", [generate_module, compare_module])
def test_every_flag_has_its_help(module: ModuleType) -> None:
    parser = ArgumentParser()
    module.add_arguments(parser)
    flags = {action.dest: action.help for action in parser._actions}
    assert all(flags.values())
    assert {"prompts", "prompts_file", "base", "raw", "top_p", "seed", "json"} <= set(flags)
    assert not {"questions", "sampling", "target", "options"} & set(flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "prompts: none was given"),
        ({"temperature": -1.0}, "temperature: must be 0 or more"),
        ({"device": "cuda:99"}, "device 'cuda:99': not available"),
        ({"device": "cpu:x"}, "device 'cpu:x': not available"),
        ({"json": "."}, r"json '\.': is a directory"),
    ],
)
def test_bad_options_are_found_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(Request, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(AlignkitError, match=message) as error:
        generate("model", **{"prompts": "Why?", **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_compare_puts_models_side_by_side(
    model_dir: Callable[[str], Path], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(model_dir("llama"))
    table, saved = tmp_path / "table.md", tmp_path / "table.json"
    comparison = compare(
        [f"base={base}", f"other={other}"],
        prompts=["Why?", "How?"],
        markdown=str(table),
        json=str(saved),
        **SHORT,
    )
    assert comparison.answers["base"] == generate(base, prompts=["Why?", "How?"], **SHORT)
    assert comparison.answers["other"] == generate(other, prompts=["Why?", "How?"], **SHORT)
    assert comparison.answers["base"] != comparison.answers["other"]
    assert table.read_text(encoding="utf-8") == comparison.to_markdown()
    assert json.loads(saved.read_text(encoding="utf-8"))["answers"] == comparison.answers
    printed = capsys.readouterr().out
    assert "base" in printed
    assert "other" in printed


def test_a_model_that_cannot_be_loaded_costs_only_itself(base: str, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    with pytest.raises(AlignkitError, match=r"1 of 3 failed: gone: model '\./gone'") as error:
        compare(
            {"base": base, "gone": "./gone", "again": base},
            prompts="Why?",
            markdown=str(table),
            **SHORT,
        )
    assert "\n" not in str(error.value)
    text = table.read_text(encoding="utf-8")
    assert text.startswith("| Prompt | base | again |\n| --- | --- | --- |\n| Why? |")
    assert "gone failed: model './gone': no such file" in text


def test_a_crash_leaves_what_was_computed(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(self: Request, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if path == "crash":
            raise torch.OutOfMemoryError("no memory")
        return load_model(path), load_tokenizer(path)

    monkeypatch.setattr(Request, "load", load)
    table = tmp_path / "table.md"
    with pytest.raises(torch.OutOfMemoryError):
        compare({"base": base, "b": "crash"}, prompts="Why?", markdown=str(table), **SHORT)
    assert table.read_text(encoding="utf-8").startswith("| Prompt | base |")
    assert "Why?" in capsys.readouterr().out


def test_markdown_shows_the_text_and_nothing_else() -> None:
    """Pipes, newlines, tags and emphasis in an answer stay text inside one cell."""
    comparison = Comparison(["a|b"], {"m": ["x\n<b>*y*</b> $1$ `z`"]})
    assert comparison.to_markdown() == (
        "| Prompt | m |\n| --- | --- |\n"
        "| a\\|b | x<br>&lt;b&gt;\\*y\\*&lt;/b&gt; &#36;1&#36; \\`z\\` |\n"
    )


def test_terminal_text_carries_no_control_codes() -> None:
    assert printable("a\x1b[31mb\n\tü\x07").plain == "a\ufffd[31mb\n\tü\ufffd"


def test_names_of_models(tmp_path: Path) -> None:
    checkpoint = tmp_path / "dpo" / "epoch=0-step=10.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("")
    assert name_models(["base=org/model", str(checkpoint), "a/b/adapter", "sft=x=1.ckpt"]) == {
        "base": "org/model",
        "dpo": str(checkpoint),
        "adapter": "a/b/adapter",
        "sft": "x=1.ckpt",
    }
    assert name_models({"a": "b"}) == {"a": "b"}


def test_a_lightning_checkpoint_name_is_no_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``epoch=0.ckpt`` reads as NAME=PATH, unless a file of that name exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch=0.ckpt").write_text("")
    assert list(name_models(["epoch=0.ckpt"]).values()) == ["epoch=0.ckpt"]
    assert name_models(["epoch=1.ckpt"]) == {"epoch": "1.ckpt"}


def test_names_collide_or_are_missing() -> None:
    with pytest.raises(AlignkitError, match="'a/m' and 'b/m' are both called 'm'"):
        name_models(["a/m", "b/m"])
    with pytest.raises(AlignkitError, match="models: none was given"):
        name_models([])


def test_options_of_transformers_are_passed_on(base: str) -> None:
    args = ["--model", base, "--prompts", "Who?", "Why?", "--device", "cpu"]
    args += ["--max_new_tokens", "12", "--repetition_penalty", "1"]

    def ask(*more: str) -> list[str]:
        return generate_module.generate(**parse(generate_module, [*args, *more]))

    greedy = ask("--temperature", "0")
    assert ask("--temperature", "0.9", "--top_k", "1") == greedy
    assert ask("--temperature", "0.9", "--top_k", "50") != greedy
    model, tokenizer = load_model(base), load_tokenizer(base)
    searched = ask("--temperature", "0", "--num_beams", "3", "--length_penalty", "0.5", "--raw")
    ids = tokenizer("Who?", return_tensors="pt")
    theirs = model.generate(
        **ids, num_beams=3, length_penalty=0.5, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert (
        searched[0]
        == tokenizer.decode(theirs[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        .split("\n\nHuman:")[0]
        .strip()
    )
    long = ask("--temperature", "0", "--suppress_tokens", "[0]", "--min_new_tokens", "12")
    assert all(long)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": {"top_kk": 3}}, "top_kk: no such option; did you mean top_k?"),
        ({"generation": {"max_length": 3}}, "max_length: give max_new_tokens"),
        ({"generation": {"output_scores": True}}, "output_scores: it changes no answer here"),
        ({"top_k": 5, "temperature": 0.0}, "top_k: has no effect at temperature 0"),
        ({"top_k": -1}, "top_k=-1: .*positive"),
        ({"renormalize_logits": "maybe"}, "renormalize_logits=maybe: give true or false"),
        ({"num_beams": 0, "temperature": 0.0}, "num_beams=0: give a whole number, 1 or more"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5: give a whole number"),
        ({"suppress_tokens": "x"}, "suppress_tokens=x: give a list of token ids"),
        ({"bad_words_ids": [1]}, "bad_words_ids=.*: give a list of lists"),
        ({"stop_strings": [3]}, "stop_strings=.*: give a text"),
        ({"max_time": -1}, "max_time=-1: give a number above 0"),
        ({"forced_eos_token_id": -4}, "forced_eos_token_id=-4: give a token id"),
        ({"min_new_tokens": 200}, "min_new_tokens=200: is above max_new_tokens=128"),
        ({"num_beams": 4}, "num_beams=4: searches beams at temperature 0 alone"),
        ({"cache_implementation": "paper"}, "cache_implementation"),
        ({"stream": True, "num_beams": 2, "temperature": 0.0}, "stream: beams are known"),
    ],
)
def test_options_of_transformers_without_a_meaning_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(AlignkitError, match=message):
        generate("no/model", prompts="Why?", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forced_bos_token_id": 99_999}, "forced_bos_token_id=99999: the model has the ids 0 to"),
        ({"suppress_tokens": [1, 99_999]}, "suppress_tokens="),
        ({"sequence_bias": 5}, "sequence_bias"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "x"}}, "generation="),
    ],
)
def test_what_generation_itself_refuses_is_one_line(
    base: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(AlignkitError, match=message) as error:
        generate(base, prompts="Why?", max_new_tokens=2, device="cpu", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_stop_leaves_the_answers_so_far(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*args: object, **options: object) -> Iterator[str]:
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(Request, "answers", stopping)
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        generate(base, prompts=["Who?", "Why?"], jsonl=str(lines), device="cpu")
    assert json.loads(lines.read_text()) == {"prompt": "Who?", "answer": "one"}
    lines.write_text("whole\n")
    with pytest.raises(KeyboardInterrupt):
        generate(base, prompts=["Who?", "Why?"], jsonl=str(lines), device="cpu")
    assert lines.read_text() == "whole\n", "it may be whole, and stays"
    assert json.loads(Path(f"{lines}.partial").read_text())["answer"] == "one"
    with pytest.raises(KeyboardInterrupt):
        compare([f"a={base}"], prompts=["Who?", "Why?"], json=str(table), device="cpu")
    found = json.loads(table.read_text())
    assert found["answers"] == {"a": ["one", ""]}
    assert found["failures"] == {"a": "stopped after 1 of 2 prompts"}


def test_two_outputs_are_two_files(base: str, tmp_path: Path) -> None:
    place = str(tmp_path / "x")
    with pytest.raises(AlignkitError, match=r"--jsonl .*: is that of --json, too"):
        generate(base, prompts="Why?", json=place, jsonl=place)


@pytest.mark.parametrize("path", ["no/such/run", "{base}"])
def test_a_base_without_a_checkpoint_is_refused(base: str, path: str) -> None:
    other = f"{base}/../somewhere"
    with pytest.raises(AlignkitError, match="is no checkpoint or adapter, which --base"):
        generate(path.format(base=base), base=other, prompts="Why?", device="cpu")


def test_streaming_shows_the_answer_in_pieces(
    base: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {"max_new_tokens": 24, "temperature": 0.9, "device": "cpu", "seed": 3}
    whole = generate(base, prompts=["Who?", "Why?"], **settings)
    capsys.readouterr()
    lines = tmp_path / "answers.jsonl"
    streamed = generate(base, prompts=["Who?", "Why?"], stream=True, jsonl=str(lines), **settings)
    assert streamed == whole
    shown = capsys.readouterr().out
    for answer in whole:
        assert printable(answer).plain in shown
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows == [
        {"prompt": q, "answer": a} for q, a in zip(["Who?", "Why?"], whole, strict=True)
    ]


def test_pieces_hold_back_what_may_still_change() -> None:
    """An unfinished character, and the beginning of the text that ends the answer."""
    steps = ["Hi", "Hi \ufffd", "Hi é", "Hi é\n\nHum", "Hi é\n\nHumble", "Hi é\n\nHumble"]
    told: list[str] = []
    pieces = Pieces(lambda ids: steps[len(ids) - 1], told.append, "\n\nHuman:")
    pieces.put(torch.tensor([[7, 8]]))  # the prompt
    for step in range(len(steps)):
        pieces.put(torch.tensor([step]))
        if step == 3:
            assert "".join(told) == "Hi é"
    pieces.end()
    assert "".join(told) == "Hi é\n\nHumble"
