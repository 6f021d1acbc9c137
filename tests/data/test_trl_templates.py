"""The chat templates that trl ships: they render what is fed, and the assistant's is scored."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from alignkit.data.text.policies import Policies
from alignkit.data.text.shapes import sft_sides
from alignkit.errors import AlignkitError
from tests.data.test_encode import encode
from tests.data.tokenizers import gpt2

_TRL = importlib.util.find_spec("trl")
_HOME = Path(str(_TRL.origin)).parent / "chat_templates" if _TRL else Path()
_MARK = re.compile(
    r"<\|[a-z_A-Z>]+\|>|<\|?[a-z_]+>|<[a-z_]+\|>|<｜[^｜]+｜>|</?s>|\[/?[A-Z_]+\]|\[gMASK\]"
)
_BOS = ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<s>", "<|startoftext|>")
_EOS = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|return|>", "<|END_OF_TURN_TOKEN|>")

ANSWERS = ("Four, I say.", "Five.\nNo: six!", "Bread\n")
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And 2 + 3? 🙂"},
    {"role": "assistant", "content": ANSWERS[1]},
    {"role": "user", "content": "Name a food."},
    {"role": "assistant", "content": ANSWERS[2]},
]
THINKING = ("deepseek_r1", "deepseekv3", "nemotron", "qwen3_5", "qwen3_6", "qwen3_8")
"""Their generation prompt writes a thought, or its beginning, that earlier answers lack."""


def templates() -> list[str]:
    """Of text models alone: a picture has no place in a row."""
    names = sorted(path.stem for path in _HOME.glob("*.jinja"))
    return [name for name in names if not re.search(r"vl|idefics|llava|diffusion", name)]


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A small tokenizer with all the special tokens that a template writes."""
    source = (_HOME / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = gpt2()
    marks = {*_MARK.findall(source), "<|endoftext|>"} - {"<think>", "<tool_call>"}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(mark, special=True) for mark in sorted(marks)]}
    )
    tokenizer.eos_token = next((each for each in _EOS if each in marks), "<|endoftext|>")
    if "bos_token" in source:
        tokenizer.bos_token = next((each for each in _BOS if each in marks), "<|endoftext|>")
    tokenizer.chat_template = source
    return tokenizer


def expected(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    tools = json.loads(row["tools"]) if row.get("tools") else None
    text = str(tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=False))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces(example: Any) -> list[list[int]]:
    """What is scored of an example's one response, without a break."""
    (response,) = example.responses
    flags = example.scored[0] if example.scored else [True] * len(response)
    groups = groupby(zip(response, flags, strict=True), key=lambda each: each[1])
    return [[token for token, _ in group] for scored, group in groups if scored]


@pytest.mark.skipif(not _TRL, reason="trl is not installed")
@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize("name", templates())
def test_what_is_fed_is_what_the_template_renders(name: str, all_turns: bool) -> None:
    tokenizer = tokenizer_of(name)
    row = {"messages": TALK}
    options: dict[str, Any] = {
        "sides": sft_sides,
        "prompt_format": "chat",
        "all_turns": all_turns,
        "max_length": 10_000,
        "policies": Policies(templated_text="keep"),
    }
    try:
        (example,), _ = encode(tokenizer, row, **options)
    except AlignkitError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert "\n" not in told
        assert "rows.jsonl:1: " in told
        assert "renders a prompt differently once its answer follows" in told
        assert name.startswith(THINKING), told
        return
    fed = [*example.prompt, *example.responses[0]]
    whole = expected(tokenizer, row)
    ends = tokenizer.convert_tokens_to_ids(list(_ends(tokenizer)))
    added = [tokenizer.eos_token_id] if fed[-1] not in whole[len(fed) - 1 : len(fed)] else []
    bare = fed[: len(fed) - len(added)]
    assert bare == whole[: len(bare)]
    # What is not fed comes after the token that ends the answer, and is not the assistant's.
    assert not tokenizer.decode(whole[len(bare) :], skip_special_tokens=True).strip()
    scored = pieces(example)
    answers = ANSWERS if all_turns else ANSWERS[-1:]
    assert len(scored) == len(answers)
    for ids, answer in zip(scored, answers, strict=True):
        said = tokenizer.decode(ids, skip_special_tokens=True)
        assert said.strip().endswith(answer.strip())
        # Beside its words there is at most the frame of a thought.
        frame = said.replace(answer.strip(), "")
        assert re.fullmatch(r"(\s|</?think>|analysis|final|thought| to=user)*", frame), said
        assert sum(token in ends for token in ids[-2:]) <= 1
    assert example.responses[0][-1] in [*ends, tokenizer.eos_token_id]


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def test_the_faults_are_few() -> None:
    """Most templates are split; the test above would pass if none were."""
    refused = [name for name in templates() if name.startswith(THINKING)]
    assert len(refused) < len(templates()) / 2
