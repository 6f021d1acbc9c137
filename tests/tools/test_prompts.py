"""Prompts from arguments and files, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.models import load_tokenizer
from alignkit.tools.generate.prompts import as_prompts, data_prompts, gather_prompts


def test_questions_are_asked_as_in_training(tokenizer_dir: Path) -> None:
    """No space after the last colon but in the stripped format."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    expected = {
        "boundary": "\n\nHuman: Why?\n\nAssistant:",
        "stripped": "Human: Why?\nAssistant: ",
        "chat": "<user>Why?<assistant>",
    }
    for prompt_format, prompt in expected.items():
        assert as_prompts([" Why?\n"], prompt_format, tokenizer) == [prompt]  # type: ignore[arg-type]


def test_a_chat_needs_a_template(tokenizer_dir: Path) -> None:
    with pytest.raises(AlignkitError, match="has no chat template"):
        as_prompts(["Why?"], "chat", load_tokenizer(str(tokenizer_dir)))


def test_one_several_and_a_file(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("first\n\n  second \n", encoding="utf-8")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "ü"}\n', encoding="utf-8")
    assert gather_prompts("one", None) == ["one"]
    assert gather_prompts(["one", "two"], str(rows)) == ["one", "two", "a\nb", "ü"]
    assert gather_prompts(None, str(text)) == ["first", "  second "]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt"', r"p\.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n{"text": "b"}', r"p\.jsonl:3: no prompt"),
        (b'{"prompt": 5}', r"p\.jsonl:1: no prompt"),
        (b'{"prompt": "  "}', r"p\.jsonl:1: no prompt"),
        (b'["prompt"]', r"p\.jsonl:1: no prompt"),
        (b"[" * 100_000, r"p\.jsonl:1: not JSON"),
        (b'{"prompt": "\xff"}', r"byte 12 is not UTF-8"),
        (b"\n\n", "holds none"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(AlignkitError, match=message) as error:
        gather_prompts(None, str(path))
    assert "\n" not in str(error.value)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """JSON and prose may hold characters that end a line elsewhere."""
    rows, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    rows.write_text('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\n', encoding="utf-8")
    text.write_text("a\u2028b\x0bc\n\nd", encoding="utf-8")
    assert gather_prompts(None, str(rows)) == ["a\u2028b\u0085c", "d"]
    assert gather_prompts(None, str(text)) == ["a\u2028b c", "d"]


def test_what_no_tokenizer_encodes_is_replaced_as_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, data = tmp_path / "p.jsonl", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "a \\ud800 b"}\n')
    chat = [{"role": "user", "content": "d\0e"}]
    data.write_text(f'{{"prompt": "\\udc80c"}}\n{json.dumps({"prompt": chat})}\n')
    found = gather_prompts(["f\ud83d"], str(rows), str(data))
    mended = [{"role": "user", "content": "d e"}]
    assert found == ["f\ufffd", "a", "a \ufffd b", "\ufffdc", mended]
    (record,) = caplog.records
    told = "4 of 5 hold NUL and other control characters, or half of a surrogate pair"
    assert f"prompts: {told} (the first is prompt 1): replaced" in record.getMessage()
    with pytest.raises(AlignkitError, match="prompt 2 is empty"):
        gather_prompts(["a", "\0"], None)


def test_missing_file_none_and_empty(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="No such file or directory"):
        gather_prompts(None, str(tmp_path / "none.txt"))
    with pytest.raises(AlignkitError, match="Is a directory"):
        gather_prompts(None, str(tmp_path))
    with pytest.raises(AlignkitError, match="none was given; pass --prompts"):
        gather_prompts([], None)
    with pytest.raises(AlignkitError, match="prompt 2 is empty"):
        gather_prompts(["a", " "], None)


def test_an_array_is_read_by_its_items(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[\n "a",\n {"prompt": "b"}\n]', encoding="utf-8")
    assert gather_prompts(None, str(path)) == ["a", "b"]
    path.write_text('["a", 3]', encoding="utf-8")
    with pytest.raises(AlignkitError, match=r"p\.json:2: no prompt"):
        gather_prompts(None, str(path))


def test_a_file_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\r\n{"prompt": "b"}\n'))
    assert gather_prompts(None, str(path)) == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(AlignkitError, match="damaged gzip data"):
        gather_prompts(None, str(path))
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"a\r\nb\n"))
    assert gather_prompts(None, str(tmp_path / "p.txt.gz")) == ["a", "b"]


def test_a_row_with_a_prompt_and_no_answer_is_a_prompt(tmp_path: Path) -> None:
    """Whatever else it holds; the system's message is part of it."""
    user, begun = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Well,"}
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "id": 3},
        {"prompt": "b", "completion": None, "text": "c"},
        {"prompt": "d", "candidates": ["e", "f"], "drawn": []},
        {"prompt": [user, begun], "source": "web"},
        {"prompt": "g", "system": "Be brief.", "id": 4},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    led = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "g"}]
    assert list(data_prompts(str(path))) == ["a", "b", "d", [user, begun], led]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "its prompt is empty; give it some text"),
        ({"prompt": " \n", "id": 1}, "its prompt is empty; give it some text"),
        ({"prompt": []}, "its prompt is empty; give it some text"),
        ({"prompt": [{"role": "user", "content": " "}]}, "its prompt is empty"),
        ({"prompt": "", "completion": "a"}, "its prompt is empty; give it some text"),
        ({"prompt": None, "id": 1}, "no prompt, only `prompt`, `id`; name a column `prompt`"),
        ({"text": "a"}, "no prompt, only `text`; name a column `prompt`"),
        ({"prompt": 3, "id": 1}, "`prompt` must be text or a list of messages"),
    ],
)
def test_a_row_without_a_prompt_is_refused_by_its_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{json.dumps(row)}\n')
    with pytest.raises(AlignkitError, match=rf"rows\.jsonl:2: .*{re.escape(message)}"):
        list(data_prompts(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt\na", "pass a .jsonl, .json or .txt file, not .csv"),
        ("p.yaml", "- a", "not .yaml"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "holds JSON; name it"),
        ("p.txt", '[\n  "a"\n]\n', "holds JSON; name it"),
        ("p", '[{"prompt": "a"}]', "holds JSON; name it"),
    ],
)
def test_no_line_of_another_format_is_a_prompt(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AlignkitError, match=re.escape(message)):
        gather_prompts(None, str(tmp_path / name))
