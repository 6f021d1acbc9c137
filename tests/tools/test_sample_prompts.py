"""What `sample`, `generate` and `compare` refuse of their prompts, and where they write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.models import load_model, load_tokenizer
from alignkit.models.text_format import TextFormat, write_format
from alignkit.tools import sample as sample_module
from alignkit.tools.compare import compare
from alignkit.tools.generate.command import generate
from alignkit.tools.judge.command import judge
from alignkit.tools.sample import sample

SHORT = {"max_new_tokens": 4, "temperature": 1.0, "device": "cpu"}


@pytest.fixture
def base(model_dir: Callable[[str], Path]) -> str:
    return str(model_dir("gpt2"))


def written(path: Path, *prompts: Any) -> str:
    path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    return str(path)


@pytest.mark.parametrize("option", ["prompts_file", "data"])
def test_no_command_writes_the_file_that_it_reads(base: str, tmp_path: Path, option: str) -> None:
    """Nor through a link to it, nor a data set's part."""
    path = written(tmp_path / "prompts.jsonl", "Why?")
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    before = Path(path).read_text()
    given = {**SHORT, option: f"{path}#train[:1]" if option == "data" else path}
    refused = pytest.raises(AlignkitError, match="is a file that is read; name another")
    for output in (path, str(link)):
        with refused:
            sample(base, output=output, **given)
        for flag in ("json", "jsonl"):
            with refused:
                generate(base, **{flag: output}, **given)
        for flag in ("json", "markdown", "html"):
            with refused:
                compare([base], **{flag: output}, **given)
    assert Path(path).read_text() == before
    assert not link.with_name(f".{link.name}.lock").exists()
    (tmp_path / "old.jsonl").write_text("")
    sample(base, output=str(tmp_path / "old.jsonl"), answers=2, **given)


def test_prompts_are_counted_once_by_their_places(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many answers are drawn, and where a run goes on."""
    shutil.copytree(base, folder := tmp_path / "base")
    write_format(TextFormat("boundary", max_length=30), folder)
    given = {**SHORT, "prompts": ["How?", "Why?", "What? " * 20], "answers": 3}
    most = load_model(base).config.max_position_embeddings - 50
    with pytest.raises(AlignkitError, match=r"prompt 3 has .* passes the model's context"):
        sample(str(folder), output=str(tmp_path / "a"), **{**given, "max_new_tokens": most})
    (tmp_path / ".a.partial").unlink()
    caplog.clear()
    said = "1 of 3 prompts (the first is prompt 3) are longer than max_length=30"
    add = sample_module._Part.add

    def stop(part: sample_module._Part, row: dict[str, Any]) -> None:
        if part.rows:
            raise KeyboardInterrupt
        add(part, row)

    with monkeypatch.context() as patch:
        patch.setattr(sample_module._Part, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            sample(str(folder), output=str(tmp_path / "a"), **given)
    sample(str(folder), output=str(tmp_path / "a"), **given)
    assert [said in record.getMessage() for record in caplog.records].count(True) == 2


@pytest.mark.parametrize("prompt_format", ["boundary", "stripped", "chat"])
def test_a_prompt_that_judge_refuses_is_refused_before_anything_is_drawn(
    base: str, tmp_path: Path, prompt_format: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, folder := tmp_path / "base")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    output = tmp_path / "drawn.jsonl"
    given = {**SHORT, "prompts": ["Why?", "Human: hi"], "answers": 2}
    told = r"prompt 2 \('Human: hi'\): a message begins with 'Human:'.*, or pass --raw"
    with pytest.raises(AlignkitError, match=told):
        sample(str(folder), output=str(output), prompt_format=prompt_format, **given)
    assert not [*tmp_path.glob("*drawn*"), *tmp_path.glob(".*")]
    rows = [{"prompt": each, "responses": ["a", "b"]} for each in given["prompts"]]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AlignkitError, match=r"drawn\.jsonl:2: .*; --prompt_format=raw takes it"):
        judge(str(output), model=str(folder), reference=base, prompt_format=prompt_format)
    sample(str(folder), output=str(output), raw=True, **given)
    assert "once more" not in caplog.text


def test_compare_warns_of_a_prompt_once(
    moved_models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though a page asks for its tokens again."""
    options = {**SHORT, "prompts": ["Why?", "Human: hi"], "html": str(tmp_path / "page.html")}
    compare([moved_models["dpo"]], **options)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("prompt 2: a message begins with 'Human:'")


def test_half_a_surrogate_pair_is_written_and_judged_as_it_was_asked(
    base: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "prompts.jsonl", "a \ud800 b")
    output = tmp_path / "drawn.jsonl"
    sample(base, output=str(output), prompts_file=path, answers=2, **SHORT)
    assert json.loads(output.read_text(encoding="utf-8"))["prompt"] == "a \ufffd b"
    options = {"prompts_file": path, **SHORT}
    generate(base, jsonl=str(tmp_path / "a.jsonl"), **options)
    compare([base], html=str(tmp_path / "a.html"), json=str(tmp_path / "a.json"), **options)
