"""``prompt_format: auto``: messages go by the chat template, HH-RLHF's text as it was published."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignkit.data import PreferenceDataModule, SFTDataModule
from alignkit.data.text.policies import Policies
from alignkit.errors import AlignkitError
from tests.data.conftest import write_jsonl
from tests.data.test_encode import TEMPLATE


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def from_(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ASKED, YES, NO = said("user", "Why?"), said("assistant", "Yes."), said("assistant", "No.")
HH = {side: f"\n\nHuman: Why?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
LED = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " a", "rejected": " b"}

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": (SFTDataModule, {"messages": [ASKED, YES]}),
    "prompt and completion": (SFTDataModule, {"prompt": "Why?", "completion": "Yes."}),
    "prompt list": (SFTDataModule, {"prompt": [ASKED], "completion": [YES]}),
    "sharegpt": (SFTDataModule, {"conversations": [from_("human", "Why?"), from_("gpt", "Yes.")]}),
    "alpaca": (SFTDataModule, {"instruction": "Why?", "input": "", "output": "Yes."}),
    "question": (SFTDataModule, {"question": "Why?", "answer": "Yes."}),
    "kto": (SFTDataModule, {"messages": [ASKED, YES], "label": True}),
    "pairs": (PreferenceDataModule, {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}),
    "ultrafeedback": (
        PreferenceDataModule,
        {"prompt": "Why?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    ),
    "sharegpt pairs": (
        PreferenceDataModule,
        {
            "conversations": [from_("human", "Why?")],
            "chosen": from_("gpt", "Yes."),
            "rejected": from_("gpt", "No."),
        },
    ),
    "orca": (
        PreferenceDataModule,
        {"system": "", "question": "Why?", "chosen": "Yes.", "rejected": "No."},
    ),
    "ranked": (PreferenceDataModule, {"prompt": "Why?", "responses": ["Yes.", "No."]}),
}


@pytest.fixture
def chat_dir(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def module(chat_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """``module(DataModule, rows)``: set up, with the tokenizer that has a template."""

    def make(cls: Any, *rows: Any, tokenizer: Path = chat_dir, **options: Any) -> Any:
        path = options.pop("path", None) or str(write_jsonl(tmp_path / "rows.jsonl", rows))
        data = cls(str(tokenizer), path, cache_dir=str(tmp_path / "cache"), **options)
        data.setup()
        return data

    return make


def stored(tmp_path: Path) -> int:
    return sum(path.is_dir() for path in (tmp_path / "cache").rglob("*") if path.parent != tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_messages_go_by_the_template(
    shape: str, module: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it chose is kept, and is the same set, in the cache too, as the format by its name."""
    cls, row = SHAPES[shape]
    with caplog.at_level(logging.INFO):
        auto = module(cls, *[row] * 4)
    (line,) = [r.getMessage() for r in caplog.records if "prompt_format" in r.getMessage()]
    assert line == (
        "data.prompt_format=auto: chat, as 4 of the first 4 rows are messages and the tokenizer "
        "has a chat template"
    )
    assert auto.text_format.prompt_format == "chat"
    assert auto.text_format.chat_template == TEMPLATE
    kept = stored(tmp_path)
    named = module(cls, *[row] * 4, prompt_format="chat")
    assert stored(tmp_path) == kept
    assert (named.text_format, named._content) == (auto.text_format, auto._content)
    assert auto._content["settings"]["format"][0] == "chat"


@pytest.mark.parametrize("row", [HH, LED], ids=["whole", "apart"])
def test_published_text_stays_as_it_is(
    row: Any, module: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = module(PreferenceDataModule, *[row] * 4)
    assert data.text_format.prompt_format == "boundary"
    assert data._content["settings"]["format"][0] == "boundary"
    assert "auto: boundary, as 0 of the first 4 rows are messages" in caplog.text


def test_without_a_template_there_is_no_choice(
    module: Callable, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = module(SFTDataModule, *[SHAPES["alpaca"][1]] * 4, tokenizer=tokenizer_dir)
    assert data.text_format.prompt_format == "boundary"
    assert f"auto: boundary, as the tokenizer {tokenizer_dir} has no chat template" in caplog.text


def test_bad_rows_and_few_others_do_not_decide(module: Callable, tmp_path: Path) -> None:
    """Most of the rows that can be read do; a directory's training rows come first."""
    policies = {"policies": Policies(bad_rows="drop")}
    prompted = SHAPES["pairs"][1]
    rows = [{"other": 1}, prompted, prompted, HH]
    assert module(PreferenceDataModule, *rows, **policies).text_format.prompt_format == "chat"
    rows = [{"other": 1}, prompted, HH, LED]
    assert module(PreferenceDataModule, *rows, **policies).text_format.prompt_format == "boundary"
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [prompted] * 3)
    write_jsonl(folder / "test.jsonl", [HH] * 9)
    data = module(PreferenceDataModule, path=str(folder))
    assert data.text_format.prompt_format == "chat"


def test_the_columns_that_are_named_are_read(module: Callable) -> None:
    row = {"q": "Why?", "good": "Yes.", "bad": "No."}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = module(PreferenceDataModule, *[row] * 4, columns=columns)
    assert data.text_format.prompt_format == "chat"


def test_an_unknown_format_is_refused(module: Callable) -> None:
    with pytest.raises(AlignkitError, match=r"data.prompt_format='hh': choose one of auto, bound"):
        module(SFTDataModule, HH, prompt_format="hh")
