"""Examples against a slow, plain encoding of the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.data import encode_prompt
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.engine import Example
from alignkit.errors import AlignkitError

OLD = "\n\nHuman: first question?\n\nAssistant: first answer."
LAST = "\n\nHuman: last question?\n\nAssistant:"
PAIR = {"chosen": f"{OLD}{LAST} bread, yes.", "rejected": f"{OLD}{LAST} no."}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def source(*rows: Any) -> Source:
    return Source("rows.jsonl", "0", lambda: enumerate(rows, start=1))


def encode(
    tokenizer: PreTrainedTokenizerBase, *rows: Any, sides: Any = preference_sides, **options: Any
) -> tuple[list[Example], Tally]:
    options.setdefault("max_length", 500)
    encoder = DialogueEncoder(tokenizer, sides, **options)
    tally = Tally()
    return [encoder.example(draft) for draft in encoder.drafts(source(*rows), tally)], tally


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_once_answers_with_their_space_and_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,), tally = encode(tokenizer, PAIR)
    eos = tokenizer.eos_token_id
    assert example.prompt == ids(tokenizer, OLD + LAST)
    assert example.responses == [
        [*ids(tokenizer, " bread, yes."), eos],
        [*ids(tokenizer, " no."), eos],
    ]
    for text, response in zip(PAIR.values(), example.responses, strict=True):
        assert [*example.prompt, *response] == [*ids(tokenizer, text), eos]
    assert tally.counts == {"rows": 1, "examples": 1}
    assert encode_prompt(tokenizer, OLD + LAST) == example.prompt


def test_k_ranked_responses(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": LAST, "responses": [" best", " fair", " worst"]}
    (example,), _ = encode(tokenizer, row)
    texts = [tokenizer.decode(response[:-1]) for response in example.responses]
    assert texts == [" best", " fair", " worst"]


def test_seed_format_is_the_reports_and_trips_the_proof(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (example,), tally = encode(tokenizer, PAIR, prompt_format="stripped")
    stem = (OLD + LAST).removesuffix("Assistant:").strip()
    assert example.prompt == ids(tokenizer, stem + "\nAssistant: ")
    assert example.responses[1] == [*ids(tokenizer, "no."), tokenizer.eos_token_id]
    assert tally.counts["boundary"] == 1
    encoder = DialogueEncoder(
        tokenizer,
        preference_sides,
        max_length=500,
        prompt_format="stripped",
        policies=Policies(boundary="error"),
    )
    with pytest.raises(
        AlignkitError, match=r"rows.jsonl:1: .* in 2 of 2 examples .*boundary to drop or keep"
    ):
        encoder.write(source(PAIR, PAIR), _Sink())


class _Sink:
    examples = 0

    def add(self, example: Example, line: int) -> None:
        self.examples += 1


def test_text_that_looks_like_eos_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token
    row = {"chosen": f"{LAST} a{eos}b", "rejected": f"{LAST} c"}
    (example,), _ = encode(tokenizer, row)
    assert example.responses[0].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.responses[0][:-1]) == f" a{eos}b"


class TestTruncation:
    """Whole turns first, then the last prompt's left; never an answer."""

    def test_by_hand(self, tokenizer: PreTrainedTokenizerBase) -> None:
        whole, last = ids(tokenizer, OLD + LAST), ids(tokenizer, LAST)
        answer = len(ids(tokenizer, " bread, yes.")) + 1
        for max_length, prompt in [
            (len(whole) + answer, whole),
            (len(whole) + answer - 1, last),
            (len(last) + answer, last),
            (len(last) + answer - 1, last[1:]),
            (answer + 1, last[-1:]),
            (answer, []),
        ]:
            (example,), tally = encode(tokenizer, PAIR, max_length=max_length)
            assert example.prompt == prompt, max_length
            assert [len(response) for response in example.responses] == [
                answer,
                len(ids(tokenizer, " no.")) + 1,
            ]
            assert tally.counts.get("truncated", 0) == (prompt != whole)

    def test_an_answer_that_cannot_fit_follows_its_policy(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        length = len(ids(tokenizer, " bread, yes.")) + 1
        examples, tally = encode(tokenizer, PAIR, max_length=length - 1)
        assert examples == []
        assert tally.counts == {"rows": 1, "too_long": 1, "dropped": 1}
        message = f"rows.jsonl:1: an answer of {length} tokens exceeds max_length={length - 1}"
        with pytest.raises(AlignkitError, match=message):
            encode(tokenizer, PAIR, max_length=length - 1, policies=Policies(too_long="error"))

    def test_system_text_stays(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"chosen": f"Be kind.{OLD}{LAST} a", "rejected": f"Be kind.{OLD}{LAST} b"}
        kept = ids(tokenizer, "Be kind." + LAST)
        (example,), _ = encode(tokenizer, row, max_length=len(kept) + 9)
        assert example.prompt == kept


class TestAllTurns:
    def test_every_assistant_turn_is_scored(self, tokenizer: PreTrainedTokenizerBase) -> None:
        (example,), tally = encode(tokenizer, PAIR, sides=sft_sides, all_turns=True)
        assert tokenizer.decode(example.prompt) == "\n\nHuman: first question?\n\nAssistant:"
        (response,), (scored,) = example.responses, example.scored or []
        assert [*example.prompt, *response] == [
            *ids(tokenizer, PAIR["chosen"]),
            tokenizer.eos_token_id,
        ]
        trained = [token for token, flag in zip(response, scored, strict=True) if flag]
        assert tokenizer.decode(trained) == " first answer. bread, yes." + tokenizer.eos_token
        assert "boundary" not in tally.counts

    def test_old_exchanges_go_first(self, tokenizer: PreTrainedTokenizerBase) -> None:
        length = len(ids(tokenizer, LAST + " bread, yes.")) + 1
        (example,), _ = encode(tokenizer, PAIR, sides=sft_sides, all_turns=True, max_length=length)
        assert tokenizer.decode(example.prompt) == LAST
        assert example.scored == [[True] * len(example.responses[0])]

    def test_seed_refuses(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(AlignkitError, match="turns=all"):
            encode(tokenizer, PAIR, all_turns=True, prompt_format="stripped")


class TestChat:
    @pytest.fixture
    def chat(self, tokenizer_dir: Path) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    def test_prompt_is_what_generation_is_fed(self, chat: PreTrainedTokenizerBase) -> None:
        (example,), tally = encode(chat, PAIR, prompt_format="chat")
        messages = [
            {"role": "user", "content": "first question?"},
            {"role": "assistant", "content": "first answer."},
            {"role": "user", "content": "last question?"},
        ]
        text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert example.prompt == ids(chat, text)
        assert chat.decode(example.responses[1]) == "no." + chat.eos_token
        assert example.responses[1].count(chat.eos_token_id) == 1
        assert "boundary" not in tally.counts

    def test_all_turns_and_truncation(self, chat: PreTrainedTokenizerBase) -> None:
        options = {"sides": sft_sides, "prompt_format": "chat", "all_turns": True}
        (example,), _ = encode(chat, PAIR, **options)
        assert chat.decode(example.prompt) == f"<user>first question?{chat.eos_token}\n<assistant>"
        (response,), (scored,) = example.responses, example.scored or []
        trained = [token for token, flag in zip(response, scored, strict=True) if flag]
        eos = chat.eos_token
        assert chat.decode(trained) == f"first answer.{eos}bread, yes.{eos}"
        (short,), _ = encode(chat, PAIR, max_length=len(response), **options)
        assert chat.decode(short.prompt) == f"<user>last question?{eos}\n<assistant>"

    def test_no_template_is_named(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(AlignkitError, match="has no chat template"):
            encode(tokenizer, PAIR, prompt_format="chat")

    def test_a_failing_template_is_one_line(self, chat: PreTrainedTokenizerBase) -> None:
        chat.chat_template = "{{ raise_exception('roles must\nalternate') }}"
        with pytest.raises(AlignkitError, match="the template failed \\(roles must\\)"):
            encode(chat, PAIR, prompt_format="chat")


def test_unknown_format_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(AlignkitError, match="choose one of boundary, stripped, chat"):
        encode(tokenizer, PAIR, prompt_format="alpaca")


def test_bos_leads_the_prompt_and_survives_truncation(tokenizer_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    bos = tokenizer.convert_tokens_to_ids("a")  # any token will do
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A", special_tokens=[("a", bos)]
    )
    (example,), tally = encode(tokenizer, PAIR)
    assert example.prompt == [bos, *ids(tokenizer, OLD + LAST)]
    assert "boundary" not in tally.counts
    assert encode_prompt(tokenizer, OLD + LAST) == example.prompt
    answer = max(len(response) for response in example.responses)
    (short,), _ = encode(tokenizer, PAIR, max_length=answer + 4)
    assert short.prompt == [bos, *ids(tokenizer, LAST)[-3:]]


def test_a_truncating_padding_tokenizer_changes_nothing(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    (before,), _ = encode(tokenizer, PAIR)
    tokenizer(["a", "b c"], max_length=4, truncation=True, padding="max_length")
    (after,), _ = encode(tokenizer, PAIR)
    assert after == before
