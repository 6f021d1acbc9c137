"""Ids against those that transformers feeds, for every kind of tokenizer, in training and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alignkit.data import encode_prompt
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.documents import DocumentEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Tally
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.engine import Example
from alignkit.models.text_format import TextFormat
from alignkit.tools.generate.request import answer_questions
from alignkit.tools.generate.sampling import Sampling
from tests.data.tokenizers import KINDS

ASKED = [{"role": "user", "content": "How do I bake bread?"}]
LONGER = [
    {"role": "user", "content": "Hello, what is salt?"},
    {"role": "assistant", "content": "It is salt."},
    *ASKED,
]
TURN_ENDS = ("<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")
ANSWERS = ("Mix flour, water.", "No é idea 😀.")


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


def source(*rows: Any) -> Source:
    return Source("rows.jsonl", "0", lambda: enumerate(rows, start=1))


def encode(tokenizer: PreTrainedTokenizerBase, row: Any, **options: Any) -> Example:
    options.setdefault("max_length", 4000)
    sides = sft_sides if options.get("all_turns") else preference_sides
    encoder = DialogueEncoder(tokenizer, sides, **options)
    (draft,) = encoder.drafts(source(row), tally := Tally())
    assert tally.counts.get("boundary", 0) == 0
    return encoder.example(draft)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    return list(encoded["input_ids"])


def fed_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    asked: TextFormat,
) -> list[int]:
    """The ids that generation hands to the model."""
    fed: list[torch.Tensor] = []

    def generate(self: Any, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        fed.append(ids)
        return ids

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    list(answer_questions(model, tokenizer, [question], Sampling(), asked))
    return [int(i) for i in fed[0][0]]


@pytest.mark.parametrize("messages", [ASKED, LONGER], ids=["one turn", "two turns"])
def test_a_chat_is_fed_as_transformers_feeds_it(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BOS comes from the template or not at all, and the end of a turn comes once."""
    answers = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    row = {"prompt": messages, "chosen": answers[0], "rejected": answers[1]}
    example = encode(tokenizer, row, prompt_format="chat")
    assert example.prompt == chat_ids(tokenizer, messages, add_generation_prompt=True)
    for answer, response in zip(answers, example.responses, strict=True):
        whole = chat_ids(tokenizer, messages + answer)
        text = tokenizer.apply_chat_template(messages + answer, tokenize=False)
        ours = example.prompt + response
        if text.rstrip().endswith(TURN_ENDS):
            assert ours == whole[: len(ours)]
            assert not tokenizer.decode(whole[len(ours) :]).strip()
        else:  # the template ends no turn, so EOS does
            assert ours == [*whole, tokenizer.eos_token_id]
    if messages is ASKED:
        asked = TextFormat("chat", 512)
        fed = fed_to_the_model(monkeypatch, tokenizer, ASKED[0]["content"], asked)
        assert fed == example.prompt


def test_a_dialogue_is_fed_as_transformers_feeds_text(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "\n\nHuman: How do I bake bread?\n\nAssistant:"
    row = {"chosen": f"{prompt} {ANSWERS[0]}", "rejected": f"{prompt} {ANSWERS[1]}"}
    example = encode(tokenizer, row)
    eos = tokenizer.eos_token_id
    for text, response in zip(row.values(), example.responses, strict=True):
        whole = tokenizer(text)["input_ids"]
        assert example.prompt + response == [*whole, *([] if whole[-1] == eos else [eos])]
        assert response.count(eos) == 1
    fed = fed_to_the_model(
        monkeypatch, tokenizer, "How do I bake bread?", TextFormat("boundary", 512)
    )
    assert fed == example.prompt == encode_prompt(tokenizer, prompt)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_document_begins_and_ends_as_the_tokenizer_has_it(
    tokenizer: PreTrainedTokenizerBase, packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Mix flour, water.", "bread"]
    encoder = DocumentEncoder(tokenizer, block_size=4000, packing=packing)
    rows = source(*({"text": text} for text in texts))
    ((_, example),) = encoder.examples(rows, Tally())
    eos = tokenizer.eos_token_id
    expected = [tokenizer(text)["input_ids"] for text in texts]
    expected = [[*ids, *([] if ids[-1] == eos else [eos])] for ids in expected]
    if packing == "concatenate":
        assert example.responses == [expected[0] + expected[1]]
    else:
        assert sorted(example.responses) == sorted(expected)
    fed = fed_to_the_model(monkeypatch, tokenizer, texts[0], TextFormat("text", 512))
    assert fed == expected[0][: len(fed)]
    assert expected[0][len(fed) :] == [eos]


def test_all_turns_are_the_whole_texts_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [*LONGER, {"role": "assistant", "content": ANSWERS[1]}]}
    example = encode(tokenizer, row, prompt_format="chat", all_turns=True)
    whole = chat_ids(tokenizer, row["messages"])
    ours = example.prompt + example.responses[0]
    assert whole[: len(ours) - 1] == ours[:-1]


def test_truncation_keeps_bos_and_the_templates_header(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Only the question gives way; a row that still does not fit goes, and is counted."""
    messages = [{"role": "user", "content": "Mix salt and " * 30 + "bread?"}]
    row = {"prompt": messages, "chosen": "Mix flour.", "rejected": "No."}
    whole = encode(tokenizer, row, prompt_format="chat")
    answer = max(map(len, whole.responses))
    short = encode(tokenizer, row, prompt_format="chat", max_length=answer + 40)
    assert len(short.prompt) == 40
    text = tokenizer.decode(short.prompt)
    filled = tokenizer.apply_chat_template(
        [{"role": "user", "content": "@"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (part.split() for part in filled.split("@"))
    assert "".join(text.split()).startswith("".join(before))
    assert "".join(text.split()).endswith("bread?" + "".join(after))
    assert short.responses == whole.responses

    tight = {"max_length": answer + 1, "prompt_format": "chat"}
    encoder = DialogueEncoder(tokenizer, preference_sides, **tight)  # type: ignore[arg-type]
    tally = Tally()
    assert list(encoder.drafts(source(row), tally)) == []
    assert (tally.counts["too_long"], tally.counts["dropped"]) == (1, 1)
