"""Rows of the people who chat: the format chosen for them, their tools, roles and continuations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.cli import main
from alignkit.data.text.policies import Policies
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from tests.data.conftest import write_jsonl
from tests.data.test_encode import TEMPLATE, encode

TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK = {"role": "user", "content": "Weather?"}
TOOL = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED: list[dict[str, Any]] = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sun"},
    {"role": "assistant", "content": "It is sunny."},
]
SHAREGPT = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": "sun"},
    {"from": "gpt", "value": "It is sunny."},
]


@pytest.fixture
def chat(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("all_turns", [False, True])
def test_tools_and_calls_are_rendered_by_a_template_that_knows_them(
    chat: PreTrainedTokenizerBase, all_turns: bool
) -> None:
    chat.chat_template = TOOLS
    whole = {"type": "function", "function": TOOL}
    for row in (
        {"messages": CALLED, "tools": [TOOL]},
        {"messages": CALLED, "tools": json.dumps([whole])},
        {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
    ):
        (example,), tally = encode(
            chat, row, sides=sft_sides, prompt_format="chat", all_turns=all_turns, max_length=900
        )
        text = chat.apply_chat_template(CALLED, tools=[whole], tokenize=False)
        assert chat.decode([*example.prompt, *example.responses[0]]) == text
        flags = example.scored[0] if example.scored else [True] * len(example.responses[0])
        kept = [token for token, flag in zip(example.responses[0], flags, strict=True) if flag]
        call = json.dumps([CALL]) + "<|endoftext|>" if all_turns else ""
        assert chat.decode(kept) == f"{call}It is sunny.<|endoftext|>"
        assert "unwritten_tools" not in tally.counts


def test_without_a_place_for_calls_they_are_text(chat: PreTrainedTokenizerBase) -> None:
    row = {"conversations": SHAREGPT, "tools": json.dumps([TOOL])}
    (example,), tally = encode(chat, row, sides=sft_sides, prompt_format="chat", max_length=900)
    assert SHAREGPT[1]["value"] in chat.decode(example.prompt)
    assert tally.counts["unwritten_tools"] == 1
    policies = Policies(unwritten_tools="error")
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: tools that the chat template has no"):
        encode(chat, row, sides=sft_sides, prompt_format="chat", policies=policies)
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: `tools`: not read"):
        encode(chat, row, sides=sft_sides)
    (example,), _ = encode(chat, {"messages": CALLED}, sides=sft_sides, max_length=900)
    assert "\n\nTool: sun\n\nAssistant:" in chat.decode(example.prompt)


def test_developer_parts_and_null_content(chat: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "No jokes."},
        {"role": "user", "content": parts},
    ]
    row = {"messages": [*asked, {"role": "assistant", "content": "Fig."}]}
    (example,), _ = encode(chat, row, sides=sft_sides, prompt_format="chat")
    expected = "<system>Be brief.\n\nNo jokes.<|endoftext|>\n<user>Name a fruit.<|endoftext|>\n"
    assert chat.decode(example.prompt) == f"{expected}<assistant>"
    picture = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    for bad, told in (
        (picture, "part of the type 'image'"),
        ({**ASK, "content": None}, "not text"),
    ):
        with pytest.raises(AlignkitError, match=rf"rows.jsonl:1: `messages` has a .*{told}"):
            encode(chat, {"messages": [bad, row["messages"][-1]]}, sides=sft_sides)


@pytest.mark.parametrize("prompt_format", ["boundary", "chat"])
@pytest.mark.parametrize("space", ["", " "])
def test_a_prompt_that_ends_in_the_assistants_words_is_continued(
    chat: PreTrainedTokenizerBase, prompt_format: Any, space: str
) -> None:
    begun = "Sure, it is"
    text = f"\n\nHuman: Weather?\n\nAssistant: {begun}"
    messages = [ASK, {"role": "assistant", "content": begun + space}]
    answers = ["sunny." if space else " sunny.", " cold."[len(space) :]]
    for prompt in (text + space, messages):
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        (example,), _ = encode(chat, row, sides=preference_sides, prompt_format=prompt_format)
        asked = (
            text
            if prompt_format == "boundary"
            else f"<user>Weather?<|endoftext|>\n<assistant>{begun}"
        )
        assert chat.decode(example.prompt) == asked
        said = [chat.decode(response) for response in example.responses]
        assert said == [" sunny.<|endoftext|>", " cold.<|endoftext|>"]


def test_a_template_that_refuses_a_row_names_its_place(
    chat: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + TEMPLATE
    )
    good = {"messages": [ASK, {"role": "assistant", "content": "Sun."}]}
    bad = {"messages": [{"role": "system", "content": "Be brief."}, *good["messages"]]}
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: .*System role not supported") as told:
        encode(chat, bad, sides=sft_sides, prompt_format="chat")
    assert "\n" not in str(told.value)
    policies = Policies(bad_rows="drop")
    kept, tally = encode(chat, bad, sides=sft_sides, prompt_format="chat", policies=policies)
    assert kept == [] and tally.counts["bad_rows"] == 1
    chat.save_pretrained(tmp_path / "chat")
    path = write_jsonl(tmp_path / "a.jsonl", [good, bad])
    options = ["--tokenizer", str(tmp_path / "chat")]
    assert main(["audit", str(path), *options]) == 0
    assert "bad_rows, row 2: " in capsys.readouterr().out
    assert main(["audit", str(write_jsonl(path, [bad])), *options]) == 1


def test_only_the_question_of_a_long_prompt_is_shortened(chat: PreTrainedTokenizerBase) -> None:
    """Even one whose words stand in the template's own text."""
    answer = {"role": "assistant", "content": "Sun."}
    for word in ("bread", "user", "assistant"):
        question = {"role": "user", "content": f"{word} " * 60 + word}
        row = {"messages": [{"role": "system", "content": "Be brief."}, question, answer]}
        (example,), tally = encode(chat, row, sides=sft_sides, prompt_format="chat", max_length=60)
        text = chat.decode(example.prompt)
        assert text.startswith("<system>Be brief.<|endoftext|>\n<user>")
        assert text.endswith(f"{word}<|endoftext|>\n<assistant>")
        assert tally.counts["truncated"] == 1
        assert len(example.prompt) + len(example.responses[0]) == 60


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.mark.parametrize("all_turns", [False, True])
def test_a_template_that_cannot_be_split_is_split_by_its_marks(
    chat: PreTrainedTokenizerBase, all_turns: bool
) -> None:
    talk = [ASK, {"role": "assistant", "content": "Sun."}] * 2
    options: dict[str, Any] = {"sides": sft_sides, "prompt_format": "chat", "all_turns": all_turns}
    chat.chat_template = MARKED
    (example,), _ = encode(chat, {"messages": talk}, **options)
    (response,) = example.responses
    turn = "<user>Weather?\n<assistant>Sun.<|endoftext|>"
    assert chat.decode([*example.prompt, *response]) == turn + turn
    flags = example.scored[0] if example.scored else [True] * len(response)
    kept = [token for token, flag in zip(response, flags, strict=True) if flag]
    assert chat.decode(kept) == "Sun.<|endoftext|>" * (2 if all_turns else 1)
    chat.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: .*'<think>' becomes 'Sun") as told:
        encode(chat, {"messages": talk}, **options)
    assert "\n" not in str(told.value)
