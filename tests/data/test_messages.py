"""What a row gives as messages is trained on as it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.data.text.defects import Judge, Policies, Tally
from alignkit.data.text.dialogue import Message
from alignkit.data.text.shapes import preference_sides, sft_sides
from tests.data.test_encode import TEMPLATE, encode

CODE = "    if x:\n        return 1\n"
CONTENTS = [
    CODE,
    "\tindented by a tab",
    "two spaces at the end  ",
    "\n\nempty lines around\n\n",
    "The Research Assistant: yes.\n\nHuman: is what I wrote.\n\nAssistant: too.",
    "Human: is how I begin",
    "Assistant:",
]
TEMPLATES = {
    "as it is": TEMPLATE,
    "trimmed": TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}"),
    "system apart": "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]"
    "{% set messages = messages[1:] %}{% endif %}" + TEMPLATE,
}


# A message that begins with a label looks rendered, which is refused unless it is meant.
AS_IT_IS = Policies(templated_text="keep")


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def conversation(content: str) -> list[dict[str, Any]]:
    """A system message, two exchanges and an answer, all with this content."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    return [message(role, content) for role in roles]


@pytest.fixture(params=TEMPLATES)
def chat(tokenizer_dir: Path, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def rendered(chat: PreTrainedTokenizerBase, messages: list[Any], asks: bool = False) -> list[int]:
    text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    return chat(str(text).rstrip(), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("content", CONTENTS)
def test_chat_feeds_what_the_template_makes_of_the_messages(
    chat: PreTrainedTokenizerBase, content: str
) -> None:
    messages = conversation(content)
    shapes: list[tuple[dict[str, Any], Any]] = [
        ({"messages": messages}, sft_sides),
        ({"prompt": messages[:-1], "completion": messages[-1:]}, sft_sides),
        ({"chosen": messages, "rejected": [*messages[:-1], message("assistant", "no")]}, None),
        ({"prompt": messages[:-1], "chosen": messages[-1:], "rejected": "no"}, None),
        ({"prompt": messages[:-1], "responses": [messages[-1:], "no"]}, None),
    ]
    for row, sides in shapes:
        (example,), tally = encode(
            chat,
            row,
            sides=sides or preference_sides,
            prompt_format="chat",
            max_length=2000,
            policies=AS_IT_IS,
        )
        assert list(example.prompt) == rendered(chat, messages[:-1], asks=True), row
        assert [*example.prompt, *example.responses[0]] == rendered(chat, messages), row
        assert "boundary" not in tally.counts


@pytest.mark.parametrize("content", CONTENTS)
def test_chat_on_all_turns(chat: PreTrainedTokenizerBase, content: str) -> None:
    row = {"messages": conversation(content)}
    (example,), _ = encode(
        chat,
        row,
        sides=sft_sides,
        prompt_format="chat",
        all_turns=True,
        max_length=2000,
        policies=AS_IT_IS,
    )
    assert [*example.prompt, *example.responses[0]] == rendered(chat, row["messages"])
    (mask,) = example.scored or []
    kept = [token for token, flag in zip(example.responses[0], mask, strict=True) if flag]
    answer = content.strip() if "trim" in str(chat.chat_template) else content
    # The line break that the template writes between turns carries no loss.
    assert chat.decode(kept) == f"{answer}{chat.eos_token}" * 2


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("all_turns", [False, True])
def test_boundary_adds_labels_and_nothing_else(
    tokenizer_dir: Path, content: str, all_turns: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    row = {"messages": conversation(content)}
    (example,), _ = encode(
        tokenizer, row, sides=sft_sides, all_turns=all_turns, max_length=2000, policies=AS_IT_IS
    )
    asked = f"{content}\n\nHuman: {content}\n\nAssistant:"
    whole = f"{asked} {content}\n\nHuman: {content}\n\nAssistant: {content}"
    (response,) = example.responses
    assert tokenizer.decode([*example.prompt, *response[:-1]]) == whole
    if all_turns:
        assert tokenizer.decode(example.prompt) == asked
        flags = zip(response, (example.scored or [[]])[0], strict=True)
        kept = tokenizer.decode([token for token, flag in flags if flag])
        assert kept == f" {content} {content}{tokenizer.eos_token}"


def test_an_answer_as_text_keeps_its_indentation(tokenizer_dir: Path) -> None:
    """Text has one space that joins it to a label, or none; any more is its own."""
    chat = AutoTokenizer.from_pretrained(tokenizer_dir)
    chat.chat_template = TEMPLATE
    for given, content in [("yes", "yes"), (" yes", "yes"), (CODE, CODE.rstrip()), ("\ta", "\ta")]:
        row = {"prompt": "q", "completion": given}
        (example,), _ = encode(chat, row, sides=sft_sides, prompt_format="chat")
        assert chat.decode(example.responses[0]) == content + chat.eos_token


@pytest.mark.parametrize("drop", ["keep", "repair"])
@pytest.mark.parametrize(
    "answer",
    [
        "Research Assistant: yes.",
        "Human: is what one calls a person",
        "Assistant: yes",
        "I say:\n\nHuman: no\n\nAssistant: yes",
        "A play.\nHuman: Enter.\n  Assistant: Exit.",
    ],
)
def test_labels_in_answers_that_came_apart_are_the_authors(answer: str, drop: Any) -> None:
    said = message("assistant", answer)
    asked = [message("user", "q")]
    published = "\n\nHuman: q\n\nAssistant:"
    rows: list[dict[str, Any]] = [
        {"chosen": [*asked, said], "rejected": [*asked, message("assistant", "no")]},
        {"prompt": asked, "chosen": [said], "rejected": "no"},
        {"prompt": asked, "chosen": answer, "rejected": "no"},
        {"prompt": "q", "chosen": answer, "rejected": "no"},
        {"prompt": published, "chosen": f" {answer}", "rejected": " no"},
        {"prompt": published, "responses": [answer, "no", "maybe"]},
    ]
    for row in rows:
        judge = Judge("rows", Policies(roles_inside_answer=drop), Tally())
        dialogue = judge.settle(preference_sides(row), 1)
        assert dialogue.prompt == published
        assert dialogue.answers[0] == f" {answer}", row
        assert dialogue.said()[0].content == answer, row


@pytest.mark.parametrize(
    "prompt",
    [
        "Who signs as Research Assistant:",
        "Sign it with\nYours, the Assistant:",
        "Human: and Assistant: are labels",
        "Assistant: is a label",
    ],
)
def test_a_question_that_ends_in_a_label_is_a_question(prompt: str) -> None:
    (side,) = sft_sides({"prompt": prompt, "completion": "me"})
    assert side.prompt == f"\n\nHuman: {prompt}\n\nAssistant:"
    assert side.messages == (Message("user", prompt),)


def settle(chosen: list[Any], rejected: list[Any], **policies: Any) -> tuple[Any, Tally]:
    tally = Tally()
    judge = Judge("rows", Policies(**policies), tally)
    row = {"chosen": chosen, "rejected": rejected}
    return judge.settle(preference_sides(row), 1), tally


@pytest.mark.parametrize("policy", ["repair", "keep"])
def test_messages_that_part_early_are_split_there(policy: Any) -> None:
    """At a message, whatever labels stand inside one."""
    first = message("user", "q\n\nAssistant: quoted")
    chosen = [first, message("assistant", "  a\n\nHuman: b"), first, message("assistant", "c")]
    rejected = [first, message("assistant", "d"), message("user", "e"), message("assistant", "f")]
    dialogue, tally = settle(chosen, rejected, differing_prompts=policy)
    assert dialogue.history() == [Message("user", first["content"])]
    assert tuple(each.content for each in dialogue.said()) == ("  a\n\nHuman: b", "d")
    assert dialogue.answers == ("   a\n\nHuman: b", " d")
    assert tally.counts["differing_prompts"] == 1


def test_messages_that_share_no_question_go() -> None:
    from alignkit.data.text.defects import Dropped

    one, other = message("user", "a"), message("user", "b")
    answer = message("assistant", "c")
    with pytest.raises(Dropped):
        settle([one, answer], [other, answer])
    with pytest.raises(Dropped):
        settle([one, answer, one, answer], [one, answer, other, answer])


class TestAfterRendering:
    """Answers that a template or a tokenizer makes one, or nothing, are judged as such."""

    def encode(self, chat: Any, chosen: Any, rejected: Any, **options: Any) -> tuple[Any, Tally]:
        row = {"prompt": "q", "chosen": chosen, "rejected": rejected}
        return encode(chat, row, prompt_format=options.pop("form", "chat"), **options)

    @pytest.fixture
    def trimming(self, tokenizer_dir: Path) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = TEMPLATES["trimmed"]
        return tokenizer

    def test_equal(self, trimming: Any) -> None:
        for one, other in [
            ("Apple.", "Apple. "),
            ([message("assistant", "Apple.")], [message("assistant", "  Apple.\n")]),
        ]:
            examples, tally = self.encode(trimming, one, other)
            assert (examples, tally.counts["identical_pairs"]) == ([], 1)
            kept, tally = self.encode(
                trimming, one, other, policies=Policies(identical_pairs="keep")
            )
            assert len(kept) == 1 and tally.counts["identical_pairs"] == 1

    def test_equal_by_the_tokenizer(self, tokenizer_dir: Path) -> None:
        from tokenizers import normalizers

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        examples, tally = self.encode(tokenizer, "Apple.", "apple.", form="boundary")
        assert (examples, tally.counts["identical_pairs"]) == ([], 1)

    def test_empty(self, tokenizer_dir: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = TEMPLATE.replace(
            "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
        )
        thought = [message("assistant", "<think>hm</think>")]
        examples, tally = self.encode(tokenizer, thought, "yes")
        assert (examples, tally.counts["empty_answers"]) == ([], 1)
        (example,), tally = self.encode(tokenizer, "<think>hm</think>no", "yes")
        assert tokenizer.decode(example.responses[0]) == "no" + tokenizer.eos_token

    def test_empty_by_the_tokenizer(self, tokenizer_dir: Path) -> None:
        from tokenizers import Regex, normalizers

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r" \[.*\]"), "")
        examples, tally = self.encode(tokenizer, "[none]", "yes", form="boundary")
        assert (examples, tally.counts["empty_answers"]) == ([], 1)
