"""Where an answer begins and ends, for tokenizers of every kind and characters of many tokens."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.data.text.shapes import sft_sides
from tests.data.test_encode import encode
from tests.data.tokenizers import KINDS

EDGES = ("🙂 two 🙂", "e\u0301 and n\u0303", "👩\u200d👩\u200d👧", "ａ中", "\u0301x", "plain.")


@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_whole_conversation(kind: str, all_turns: bool) -> None:
    tokenizer = KINDS[kind]()
    for words in EDGES:
        talk = [{"role": role, "content": words} for role in ("user", "assistant") * 2]
        options: dict[str, Any] = {"sides": sft_sides, "all_turns": all_turns, "max_length": 999}
        (example,), tally = encode(tokenizer, {"messages": talk}, prompt_format="chat", **options)
        (response,) = example.responses
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        fed = [*example.prompt, *response]
        length = len(fed) - (fed[-1] == tokenizer.eos_token_id and tokenizer.eos_token not in text)
        assert fed[:length] == whole[:length]
        assert not tokenizer.decode(whole[length:], skip_special_tokens=True).strip()
        flags = example.scored[0] if example.scored else [True] * len(response)
        kept = [token for token, flag in zip(response, flags, strict=True) if flag]
        said = tokenizer.decode(kept, skip_special_tokens=True)
        assert said.count(words) == (2 if all_turns else 1)
        assert not said.replace(words, "").strip()
        assert "boundary" not in tally.counts
        (plain,), tally = encode(tokenizer, {"messages": talk}, **options)
        assert "boundary" not in tally.counts
        assert words in tokenizer.decode(plain.responses[0], skip_special_tokens=True)
