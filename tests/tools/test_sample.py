"""Sampling several answers to a prompt, judging them, and training on what the judge wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.cli import main
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides
from alignkit.errors import AlignkitError
from alignkit.models import load_model, load_tokenizer
from alignkit.models.text_format import TextFormat
from alignkit.tools import sample as sample_module
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.prompts import data_prompts, encode_prompts
from alignkit.tools.sample import log_probs, sample

FEW = {"max_new_tokens": 6, "device": "cpu", "answers": 3, "temperature": 1.0, "top_p": 1.0}
QUESTIONS = ["Why is the sky blue?", "How?", "What is two and two, and why?", "Who?"]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["gpt2", "llama"])
def base(model_dir: Callable[[str], Path], request: pytest.FixtureRequest) -> str:
    return str(model_dir(request.param))


def test_log_probs_are_those_of_each_answer_alone(base: str) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt = tokenizer("\n\nHuman: Why?\n\nAssistant:")["input_ids"]
    answers = [
        Answer("", (5, 6, 7), ended=True, end=(tokenizer.eos_token_id,)),
        Answer("", (9,), ended=False),
        Answer("", (), ended=True, end=(tokenizer.eos_token_id,)),
    ]
    for answer, found in zip(answers, log_probs(model, prompt, answers), strict=True):
        ids = torch.tensor([[*prompt, *answer.ids, *answer.end]])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        each = logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        assert found == pytest.approx(each[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_rows_do_not_depend_on_the_batch(base: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "all.jsonl"]
    for path, size in zip(paths, (1, 12), strict=True):
        sample(base, output=str(path), prompts=QUESTIONS, batch_size=size, **FEW)
    one, other = map(rows_of, paths)
    assert [row["candidates"] for row in one] == [row["candidates"] for row in other]
    assert [row["prompt"] for row in one] == QUESTIONS
    assert all(len(set(row["candidates"])) > 1 for row in one), "each answer has its own noise"
    for row, same in zip(one, other, strict=True):
        for drawn, again in zip(row["drawn"], same["drawn"], strict=True):
            assert drawn["logp"] == pytest.approx(again["logp"], abs=1e-3)
            assert drawn["logp"] < 0
            assert 1 <= drawn["tokens"] <= 7


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    sample(base, output=str(whole), prompts=QUESTIONS, **FEW)
    add = sample_module._Part.add

    def stop(part: sample_module._Part, row: dict) -> None:
        if len(part.rows) == 2:
            part._file.write('{"prompt": "What is')  # a line that was not written whole
            raise KeyboardInterrupt
        add(part, row)

    monkeypatch.setattr(sample_module._Part, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        sample(base, output=str(output), prompts=QUESTIONS, **FEW)
    monkeypatch.undo()
    assert not output.exists()
    for other in ({"seed": 1}, {"prompts": QUESTIONS[:3]}, {"answers": 4}):
        with pytest.raises(AlignkitError, match="was begun with another model, other prompts"):
            sample(base, **{"output": str(output), "prompts": QUESTIONS, **FEW, **other})
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(sample_module, "log_probs", lambda *a: drawn.append(a) or log_probs(*a))
        sample(base, output=str(output), prompts=QUESTIONS, **FEW)
    assert len(drawn) == 2, "the first two prompts were not answered again"
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again.jsonl", "whole.jsonl"]


def test_a_row_holds_the_system_message(base: str, tmp_path: Path) -> None:
    """Whoever judges and trains on it reads the prompt that was answered, in any shape."""
    text = "\n\nHuman: Why?\n\nAssistant:"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    prompts = tmp_path / "prompts.jsonl"
    given = ["Why?", text, chat]
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in given))

    def of(system: str | None, name: str) -> list[dict]:
        path = tmp_path / name
        sample(base, output=str(path), data=str(prompts), system=system, **FEW)
        return rows_of(path)

    plain, told = of(None, "plain.jsonl"), of("Be brief.", "told.jsonl")
    assert [row["prompt"] for row in plain] == ["Why?", text, chat]
    brief = [{"role": "system", "content": "Be brief."}, chat[1]]
    assert [row["prompt"] for row in told] == [brief, f"Be brief.{text}", chat]
    tokenizer = load_tokenizer(base)
    encoder = DialogueEncoder(tokenizer, preference_sides, max_length=512)
    rows = [{"prompt": row["prompt"], "responses": ["Yes.", "No."]} for row in told]
    source = Source("told", "", lambda: iter(enumerate(rows, start=1)))
    asked = TextFormat("boundary", max_length=0, system="Be brief.")
    for draft, question in zip(encoder.drafts(source, Tally()), given, strict=True):
        (ids,) = encode_prompts([question], asked, tokenizer)
        assert list(draft.prompt) == ids


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HH = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman:  But why? \n\nAssistant:"
ROWS: dict[str, list[Any]] = {
    "boundary": [HH, f"{HH} Well, I"],
    "stripped": [HH],
    "chat": [HH, f"{HH} Well, I"],
    "raw": [HH, "  User: Why?\nBot:\n"],
}


@pytest.fixture
def chat_base(base: str, tmp_path: Path) -> str:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path / "chat_base"
    shutil.copytree(base, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids_asked(
    monkeypatch: pytest.MonkeyPatch, base: str, output: Path, **options: Any
) -> list[list[int]]:
    """Return the ids of each prompt that `sample` asks."""
    asked: list[list[int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            sample_module, "log_probs", lambda *a: asked.append(list(a[1])) or log_probs(*a)
        )
        sample(base, output=str(output), **{**FEW, "max_new_tokens": 2, **options})
    return asked


def ids_read(base: str, prompts: list[Any], prompt_format: Any) -> list[list[int]]:
    """Return the ids of each prompt as training encodes it with two answers."""
    encoder = DialogueEncoder(
        load_tokenizer(base),
        preference_sides,
        max_length=512,
        prompt_format=prompt_format,
        policies=Policies(boundary="keep"),
    )
    rows = [{"prompt": prompt, "responses": [" Yes.", " No."]} for prompt in prompts]
    source = Source("rows", "", lambda: iter(enumerate(rows, start=1)))
    return [list(encoder.example(draft).prompt) for draft in encoder.drafts(source, Tally())]


@pytest.mark.parametrize("prompt_format", [*ROWS])
def test_a_data_set_is_asked_as_training_encodes_it(
    chat_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_format: str
) -> None:
    """With the empty line in front of the first ``Human:``, and all white space of ``raw``."""
    prompts = ROWS[prompt_format]
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": each, "chosen": " Yes.", "rejected": " No."} for each in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "drawn.jsonl"
    options = {"data": str(data), "prompt_format": prompt_format}
    asked = ids_asked(monkeypatch, chat_base, output, **options)
    assert asked == ids_read(chat_base, prompts, prompt_format)
    assert [row["prompt"] for row in rows_of(output)] == prompts


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("prompt_format", [*ROWS])
def test_a_row_holds_the_prompt_that_was_asked(
    chat_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_format: str,
    system: str | None,
) -> None:  # fmt: skip
    """White space around it, or after the last label, is in both or in neither."""
    begun = [] if prompt_format == "stripped" else [f"{HH} Well, I"]
    output = tmp_path / "drawn.jsonl"
    asked = ids_asked(
        monkeypatch, chat_base, output, prompt_format=prompt_format, system=system,
        prompts=["  Why? \n", "\u00a0Why?\t", "a\r\nb", HH, f"{HH} \n", *begun],
    )  # fmt: skip
    written = [row["prompt"] for row in rows_of(output)]
    assert asked == ids_read(chat_base, written, prompt_format)


def test_a_refused_request_leaves_nothing_in_the_way(base: str, tmp_path: Path) -> None:
    output = str(tmp_path / "rows.jsonl")
    with pytest.raises(AlignkitError, match="shorten it or max_new_tokens"):
        sample(base, output=output, prompts=["Why?"], **{**FEW, "max_new_tokens": 4000})
    sample(base, output=output, prompts=["Why?"], **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_output_has_one_writer(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at once would lose each other's rows."""
    output = str(tmp_path / "rows.jsonl")
    refusals = []

    def meanwhile(*arguments: object) -> list[float]:
        with pytest.raises(AlignkitError, match="another run is writing it") as refusal:
            sample(base, output=output, prompts=QUESTIONS, **FEW)
        refusals.append(refusal)
        return log_probs(*arguments)

    monkeypatch.setattr(sample_module, "log_probs", meanwhile)
    sample(base, output=output, prompts=QUESTIONS[:2], **FEW)
    assert len(refusals) == 2
    assert [row["prompt"] for row in rows_of(Path(output))] == QUESTIONS[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_requests(base: str, tmp_path: Path) -> None:
    output = str(tmp_path / "rows.jsonl")
    with pytest.raises(AlignkitError, match="answers: must be 2 or more, got 1"):
        sample(base, output=output, prompts=["Why?"], **{**FEW, "answers": 1})
    with pytest.raises(AlignkitError, match="temperature: at 0 all answers to a prompt"):
        sample(base, output=output, prompts=["Why?"], **{**FEW, "temperature": 0})
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(AlignkitError, match=r"p\.jsonl#test.*has no split test, only train"):
        sample(base, output=output, data=f"{path}#test", **FEW)


def test_prompts_of_a_data_set(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    hh = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: But why?\n\nAssistant:"
    rows = [
        {"prompt": "Why?"},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"messages": [*chat, {"role": "assistant", "content": "So."}]},
        {"chosen": f"{hh} So.", "rejected": f"{hh} No."},
        {"prompt": "Why?"},
    ]
    (tmp_path / "train.jsonl").write_text('{"prompt": "not this"}\n')
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert list(data_prompts(str(tmp_path))) == ["Why?", chat, hh]
    assert len(list(data_prompts(f"{tmp_path}#train"))) == 1
    assert list(data_prompts(f"{tmp_path}#test[1:3]")) == ["Why?", chat]
    path.write_text('{"prompt": "Why?"}\n{"prompt": 3}\n')
    with pytest.raises(AlignkitError, match=r"test\.jsonl:2: "):
        list(data_prompts(str(tmp_path)))


def test_a_round(
    model_dir: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Sample, judge, train on the ranked answers: three commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    base = str(model_dir("llama"))
    prompts = [f"Say {n}." for n in range(8)]
    assert main(
        ["sample", "--model", base, "--prompts", *prompts, "--answers", "4", "--output",
         "drawn.jsonl", "--max_new_tokens", "6", "--temperature", "1", "--device", "cpu"]
    ) == 0  # fmt: skip
    assert "next: alignkit judge drawn.jsonl" in capsys.readouterr().out
    fit = ["fit", "--model", "DPOModule", "--model.base", base, "--model.loss", "PlackettLuce",
           "--data", "PreferenceDataModule", "--trainer.max_steps", "2", "--trainer.accelerator",
           "cpu", "--trainer.logger", "false"]  # fmt: skip
    assert main([*fit, "--data.path", "drawn.jsonl"]) == 2, "nobody has judged them yet"
    error = capsys.readouterr().err
    assert "candidates" in error
    assert "alignkit judge" in error
    other = str(model_dir("gpt_neox"))
    assert main(["judge", "drawn.jsonl", "--model", base, "--reference", other, "--output",
                 "ranked.jsonl"]) == 0  # fmt: skip
    drawn = {row["prompt"]: row["candidates"] for row in rows_of(Path("drawn.jsonl"))}
    ranked = rows_of(Path("ranked.jsonl"))
    said = {prompt: sum(map(bool, answers)) for prompt, answers in drawn.items()}
    assert len(ranked) == sum(count > 1 for count in said.values()) > 0
    for row in ranked:
        (question,) = row["prompt"]
        assert len(row["responses"]) == said[question["content"]], "all but the empty ones"
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert main([*fit, "--data.path", "ranked.jsonl"]) == 0
