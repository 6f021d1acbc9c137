"""Text that was rendered before: found, never rendered or ended twice, taken as it is if asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.documents import DocumentEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from alignkit.tools.audit.command import audit
from tests.data.conftest import write_jsonl
from tests.data.tokenizers import KINDS, adds_both, gpt2, llama_2, llama_3

HH = "\n\nHuman: {}\n\nAssistant:"
IM = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

RENDERED = {
    "chatml": {"prompt": IM, "chosen": "Yes<|im_end|>", "rejected": "No<|im_end|>"},
    "llama 2": {"prompt": "<s>[INST] Hi [/INST]", "chosen": "Yes</s>", "rejected": "No</s>"},
    "gemma": {
        "prompt": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "chosen": "Yes<end_of_turn>\n",
        "rejected": "No<end_of_turn>\n",
    },
    "answers alone": {"prompt": "Hi", "chosen": "Yes</s>", "rejected": "No</s>"},
    "one answer": {"prompt": "Hi", "chosen": "Yes.", "rejected": "No.<|endoftext|>"},
    "answers of hh": {
        "chosen": HH.format("Hi") + " Yes<|endoftext|>",
        "rejected": HH.format("Hi") + " No<|endoftext|>",
    },
    "an earlier turn": {
        "chosen": HH.format("Hi") + " Hello.</s>" + HH.format("And?") + " Yes",
        "rejected": HH.format("Hi") + " Hello.</s>" + HH.format("And?") + " No",
    },
    "a message": {
        "prompt": [{"role": "user", "content": "[INST] Hi [/INST]"}],
        "chosen": [{"role": "assistant", "content": "Yes"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    },
    "alpaca": {
        "prompt": "Below is a task.\n\n### Instruction:\nHi\n\n### Response:\n",
        "chosen": "Yes",
        "rejected": "No",
    },
    "vicuna": {"prompt": "A chat. USER: Hi ASSISTANT:", "chosen": "Yes", "rejected": "No"},
    "hh without its last label": {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?",
        "chosen": "Yes",
        "rejected": "No",
    },
    "a labelled answer": {"prompt": "Hi", "chosen": "Assistant: Yes", "rejected": "No"},
}


def source(*rows: Any) -> Source:
    return Source("rows.jsonl", "0", lambda: enumerate(rows, start=1))


def encode(
    tokenizer: PreTrainedTokenizerBase, *rows: Any, sides: Any = preference_sides, **options: Any
) -> tuple[list[Any], Tally]:
    encoder = DialogueEncoder(tokenizer, sides, max_length=4000, **options)
    tally = Tally()
    return [encoder.example(draft) for draft in encoder.drafts(source(*rows), tally)], tally


@pytest.mark.parametrize("row", RENDERED.values(), ids=RENDERED)
@pytest.mark.parametrize("prompt_format", ["boundary", "chat"])
def test_rendered_text_is_refused_with_its_place(row: Any, prompt_format: Any) -> None:
    clean = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    with pytest.raises(AlignkitError, match=r"^rows.jsonl:2: .*raw.*templated_text") as error:
        encode(gpt2(), clean, row, prompt_format=prompt_format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", RENDERED.values(), ids=RENDERED)
def test_the_audit_finds_it_with_and_without_a_tokenizer(
    row: Any, tmp_path: Path, tokenizer_dir: Path
) -> None:
    clean = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    path = write_jsonl(tmp_path / "rows.jsonl", [clean, row])
    for tokenizer in (None, str(tokenizer_dir)):
        report = audit(str(path), tokenizer=tokenizer)
        assert report["row_numbers"]["templated_text"] == [2]
        assert report["examples"]["templated_text"]


def test_the_tokenizers_own_template_is_known_without_special_tokens() -> None:
    rows = {"prompt": "[user]Hi\n[assistant]", "chosen": "Yes", "rejected": "No"}
    with pytest.raises(AlignkitError, match=r"ends with '\[assistant\]'"):
        encode(adds_both(), rows)
    assert len(encode(gpt2(), rows)[0]) == 1, "to another tokenizer it is text"


@pytest.mark.parametrize("kind", KINDS)
def test_eos_in_text_never_comes_twice(kind: str) -> None:
    """Whatever the policy: taken off as text, or read as the end that it is."""
    tokenizer = KINDS[kind]()
    eos, text = tokenizer.eos_token_id, str(tokenizer.eos_token)
    row = {"prompt": "Hi", "chosen": f"Yes{text}", "rejected": f"No{text}{text} \n"}
    bare = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    for prompt_format in ("boundary", "chat"):
        ((expected,), _) = encode(tokenizer, bare, prompt_format=prompt_format)
        for policy in ("keep", "repair"):
            policies = Policies(templated_text=policy)
            (example,), tally = encode(
                tokenizer, row, prompt_format=prompt_format, policies=policies
            )
            assert example == expected
            assert tally.counts["templated_text"] == 1
        examples, tally = encode(tokenizer, row, policies=Policies(templated_text="drop"))
        assert (examples, tally.counts["dropped"]) == ([], 1)
    row["prompt"] = "anything"
    row["rejected"] = f"No{text}\n"
    (example,), _ = encode(tokenizer, row, prompt_format="raw")
    assert [each.count(eos) for each in example.responses] == [1, 1]
    assert all(each[-1] == eos for each in example.responses)


def test_a_mention_is_text_unless_it_would_be_read_as_special() -> None:
    tokenizer = gpt2()
    row = {"prompt": "What is <|im_end|>?", "chosen": "A <s>mark</s> too.", "rejected": "No."}
    (example,), tally = encode(tokenizer, row)
    assert tokenizer.decode(example.responses[0][:-1]) == " A <s>mark</s> too."
    assert tally.counts["templated_text"] == 1
    encode(tokenizer, row, prompt_format="chat")
    row["prompt"] = "What is <|endoftext|> for?"
    assert encode(tokenizer, row)[1].counts["templated_text"] == 1
    with pytest.raises(AlignkitError, match=r"holds '<\|endoftext\|>'"):
        encode(tokenizer, row, prompt_format="chat")


def test_what_cannot_be_repaired_goes() -> None:
    policies = Policies(templated_text="repair")
    examples, tally = encode(llama_2(), RENDERED["llama 2"], policies=policies)
    assert examples == []
    assert tally.counts == {"rows": 1, "templated_text": 1, "dropped": 1}


def test_raw_rows_are_taken_as_they_are() -> None:
    """The ids are those of the text, BOS and ends once, however much the row wrote itself."""
    tokenizer = llama_3()
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    row = {"prompt": prompt, "chosen": "Mix flour.<|eot_id|>", "rejected": "No.<|eot_id|>\n"}
    (raw,), tally = encode(tokenizer, row, prompt_format="raw")
    answers = {
        key: [{"role": "assistant", "content": row[key].split("<")[0]}]
        for key in ("chosen", "rejected")
    }
    (chat,), _ = encode(tokenizer, {"prompt": messages, **answers}, prompt_format="chat")
    assert raw == chat
    assert "templated_text" not in tally.counts
    without = {**row, "prompt": prompt.removeprefix(str(tokenizer.bos_token)), "chosen": "Mix."}
    (raw,), _ = encode(tokenizer, without, prompt_format="raw")
    assert raw.prompt == chat.prompt, "a BOS that the text lacks comes from the tokenizer"
    assert raw.responses[0][-1] == tokenizer.eos_token_id, "an answer that does not end is ended"


def test_raw_shapes_and_limits() -> None:
    tokenizer = gpt2()
    ranked = {"prompt": "Q: ", "responses": ["a<|endoftext|>", "b", "c"]}
    (example,), _ = encode(tokenizer, ranked, prompt_format="raw")
    assert [tokenizer.decode(each) for each in example.responses] == [
        f"{answer}<|endoftext|>" for answer in "abc"
    ]
    (example,), _ = encode(
        tokenizer, {"prompt": "Q: ", "completion": "a"}, sides=sft_sides, prompt_format="raw"
    )
    assert tokenizer.decode(example.prompt + example.responses[0]) == "Q: a<|endoftext|>"
    for row, told in (
        ({"chosen": "a", "rejected": "b"}, "needs `prompt` as text"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "needs `prompt` as text"),
        ({"prompt": "a", "responses": ["a", 1]}, "`responses` must hold text"),
    ):
        with pytest.raises(AlignkitError, match=f"rows.jsonl:1: .*{told}"):
            encode(tokenizer, row, prompt_format="raw")
    for label in (False, 0):
        unwanted = {"prompt": "Q: ", "completion": "a", "label": label}
        examples, tally = encode(tokenizer, unwanted, sides=sft_sides, prompt_format="raw")
        assert (examples, tally.counts["unwanted_answers"]) == ([], 1)
    for name, value in (("weight", 0.5), ("label", 2)):
        row = {"prompt": "Q: ", "completion": "a", name: value}
        with pytest.raises(AlignkitError, match=f"`{name}`"):
            encode(tokenizer, row, sides=sft_sides, prompt_format="raw")
    with pytest.raises(AlignkitError, match="turns=all: prompt_format=raw"):
        encode(tokenizer, ranked, sides=sft_sides, prompt_format="raw", all_turns=True)
    encoder = DialogueEncoder(tokenizer, preference_sides, max_length=3, prompt_format="raw")
    assert list(encoder.drafts(source(ranked), tally := Tally())) == []
    assert tally.counts["too_long"] == 1, "a raw prompt is never cut: nobody knows its header"


def test_documents_are_ended_once_and_mentions_stay_text() -> None:
    for make in (gpt2, adds_both):
        tokenizer = make()
        bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token)
        rows = [{"text": "bread"}, {"text": f"{bos}bread{eos}"}, {"text": f"bread{eos}{eos}\n"}]
        encoder = DocumentEncoder(tokenizer, block_size=500, packing="best_fit")
        tally = Tally()
        ((_, example),) = encoder.examples(source(*rows), tally)
        assert example.responses[0] == example.responses[1] == example.responses[2]
        assert example.responses[0].count(tokenizer.eos_token_id) == 1
        assert tally.counts["templated_text"] == 2
        mention = f"bread {eos} flour"
        ((_, example),) = encoder.examples(source({"text": mention}), Tally())
        assert tokenizer.decode(example.responses[0][:-1], skip_special_tokens=False).endswith(
            mention
        )
        assert list(encoder.examples(source({"text": eos}), tally)) == [], "nothing is left"
        strict = DocumentEncoder(
            tokenizer, block_size=500, packing="best_fit", policies=Policies(templated_text="error")
        )
        with pytest.raises(AlignkitError, match=r"rows.jsonl:2: the text holds"):
            list(strict.examples(source(*rows), Tally()))


def test_real_text_is_not_taken_for_rendered(real_data: Path) -> None:
    for path in ("data/hh-rlhf/harmless-base", "data/openwebtext"):
        report = audit(str(real_data / path), tokenizer=str(real_data / "tokenizers/gpt-neox-20b"))
        assert report["templated_text"] == 0


def test_the_command_refuses_and_takes_it_raw(make: Callable[..., Any], tmp_path: Path) -> None:
    from alignkit.data import HHPreferenceDataModule

    rows = [{"prompt": "Hi\n", "chosen": "a<|endoftext|>", "rejected": "b"}] * 12
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AlignkitError, match=r"rows.jsonl:1: .*data.prompt_format=raw"):
        make(HHPreferenceDataModule, str(path)).setup()
    data = make(HHPreferenceDataModule, str(path), prompt_format="raw")
    data.setup()
    example = next(iter(data.train_dataloader()))
    assert example.num_responses == 2 * example.num_examples
