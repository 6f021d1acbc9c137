"""Render messages with a chat template, and find where each turn of the assistant stands.

The whole conversation is rendered once, so what is fed in training is what
``apply_chat_template`` gives for it. A turn of the assistant begins where the template's
generation prompt ends. Where a template writes something else once an answer follows, the marks
of its ``{% generation %}`` blocks say where turns are; without them it cannot be split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alignkit.data.text.dialogue import Message
from alignkit.data.text.thoughts import THOUGHTS, thoughts_read
from alignkit.errors import AlignkitError
from alignkit.models.tokenizer import end_tokens

_MARKED = re.compile(r"\{%-?\s*generation\b")
_SAMPLE = "the words of alignkit's question"


class ChatTemplate:
    """Render messages with a chat template and find the assistant's turns in the text.

    Args:
        tokenizer: Its special tokens are those that the template writes.
        template: The template's source.

    Attributes:
        source: The template's source.
        reads_tools: Whether it writes the tools that may be called.
        thoughts: The fields of thoughts that it writes, for some messages at least.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.source = template
        self.reads_tools = bool(re.search(r"\btools\b", template))
        self.thoughts = thoughts_read(template)
        self._reads_calls = "tool_calls" in template
        self._marked = bool(_MARKED.search(template))
        self._tokenizer = tokenizer
        ends = sorted(end_tokens(tokenizer), key=len, reverse=True)
        any_end = "|".join(map(re.escape, ends)) or r"(?!)"
        self._end = re.compile(any_end)
        self._at_end = re.compile(rf"({any_end})(?:\s|{any_end})*\Z")

    def apply(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = ""
    ) -> str:
        """Render messages with the template.

        Raises:
            AlignkitError: The template refuses them.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [self._plain(each) for each in messages],
                chat_template=self.source,
                tools=json.loads(tools) if tools and self.reads_tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise AlignkitError(f"prompt_format=chat: the template failed ({reason})") from error
        return str(text)

    def turns(
        self, messages: Sequence[Message], wanted: Sequence[int], tools: str = ""
    ) -> tuple[str, list[slice]]:
        """Return a conversation's text, and where some of its messages stand in it.

        Args:
            messages: The conversation; its last message is the assistant's.
            wanted: Which messages, all the assistant's, the last one among them.
            tools: JSON of the tools that may be called.

        Raises:
            AlignkitError: The template refuses them, or cannot be split.
        """
        whole = self.apply(messages, add_generation_prompt=False, tools=tools)
        turns = []
        for at in wanted:
            asked = self.apply(messages[:at], add_generation_prompt=True, tools=tools)
            end = None
            if whole.startswith(asked):
                end = self._end_of(messages, at, whole, len(asked), tools)
            if end is None:
                return whole, self._marked_turns(messages, wanted, tools, whole, asked, at)
            turns.append(slice(len(asked), end))
        return whole, turns

    def words_of(self, messages: Sequence[Message], text: str, tools: str) -> tuple[int, int]:
        """Find the last message's content in a prompt that asks for an answer to it.

        Args:
            messages: At least one.
            text: What `apply` made of them.
            tools: As there.

        Returns:
            The first character and the one after the last; the same twice where the template
            makes something else of it.
        """
        last = messages[-1]
        if last.role not in ("user", "tool"):
            return 0, 0
        sample = [*messages[:-1], last._replace(content=_SAMPLE)]
        at = self.apply(sample, add_generation_prompt=True, tools=tools).rfind(_SAMPLE)
        for words in (last.content, last.content.strip()):
            if at >= 0 and text.startswith(words, at):
                return at, at + len(words)
        return 0, 0

    def upto_end(self, text: str, start: int = 0) -> int:
        """Return where a text's last message, the assistant's, ends: after its end token.

        White space behind it, and another end token that closes the conversation, are not the
        assistant's. Without an end token that is the end of the text.
        """
        found = self._at_end.search(text, start)
        return found.end(1) if found else len(text)

    def _end_of(
        self, messages: Sequence[Message], at: int, whole: str, start: int, tools: str
    ) -> int | None:
        """Return where the message ends whose turn starts at ``start``; ``None`` if unknown.

        In the middle of a conversation that is the end token right behind its words, or the
        words' end where the template writes none.
        """
        if at == len(messages) - 1:
            return self.upto_end(whole, start)
        words = messages[at].content.strip()
        plain = bool(words) and "content" not in json.loads(messages[at].fields or "{}")
        found = whole.find(words, start) if plain else -1
        # The frame may hold them too, and a thought among them may be left out.
        if plain and (found < 0 or words in whole[found + 1 :]):
            end = self._end_by_sample(messages, at, whole, tools)
            if end is not None and end >= start + (len(words) if found >= 0 else 0):
                return self._closed(whole, end)
        if found >= 0 and not self._end.search(whole, start, found):
            return self._closed(whole, found + len(words))
        alone = self.apply(messages[: at + 1], add_generation_prompt=False, tools=tools)
        end = self.upto_end(alone, start)
        if whole.startswith(alone[:end]):
            return end
        # Another token may end the last message than those before it.
        end = found + len(words)
        return self._closed(whole, end) if found >= 0 and whole[:end] == alone[:end] else None

    def _end_by_sample(
        self, messages: Sequence[Message], at: int, whole: str, tools: str
    ) -> int | None:
        """Find where a message's words end, by rendering other words in their place."""
        sample = [*messages[:at], messages[at]._replace(content=_SAMPLE), *messages[at + 1 :]]
        text = self.apply(sample, add_generation_prompt=False, tools=tools)
        _, found, rest = text.rpartition(_SAMPLE)
        return len(whole) - len(rest) if found and whole.endswith(rest) else None

    def _closed(self, whole: str, end: int) -> int:
        """Return where a message ends: behind the end token after its words, if any."""
        space = len(whole[end:]) - len(whole[end:].lstrip())
        close = self._end.match(whole, end + space)
        return close.end() if close else end

    def _marked_turns(
        self,
        messages: Sequence[Message],
        wanted: Sequence[int],
        tools: str,
        whole: str,
        asked: str,
        at: int,
    ) -> list[slice]:
        """Return the turns by the template's own marks, of which each message has one.

        Raises:
            AlignkitError: It has none, or others.
        """
        spans: list[tuple[int, int]] = []
        if self._marked:
            render: Any = render_jinja_template  # its types leave the marks out
            _, (spans,) = render(
                conversations=[[self._plain(each) for each in messages]],
                chat_template=self.source,
                tools=json.loads(tools) if tools and self.reads_tools else None,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        spoken = [i for i, each in enumerate(messages) if each.role == "assistant"]
        # What closes the conversation may be marked besides, behind the last message.
        if len(spans) not in (len(spoken), len(spoken) + 1):
            same = _common(whole, asked)
            last = self.apply(messages[:-1], add_generation_prompt=True, tools=tools)
            splits = at < len(messages) - 1 and whole.startswith(last)
            raise AlignkitError(
                "prompt_format=chat: this chat template renders a prompt differently once its "
                f"answer follows ({asked[same : same + 20]!r} becomes "
                f"{whole[same : same + 20]!r}), so no answer can be scored; use "
                f"{'data.turns=last, ' if splits else ''}a template with {{% generation %}} marks, "
                "or prompt_format=boundary"
            )
        marked = dict(zip(spoken, spans, strict=False))
        return [
            slice(start, self.upto_end(whole[:end], start))
            for start, end in (marked[at] for at in wanted)
        ]

    def _plain(self, message: Message) -> dict[str, Any]:
        """Return a message as the template takes it."""
        plain = {"role": message.role, "content": message.content}
        if message.fields:
            called = self._reads_calls or message.role == "tool"
            for name, value in json.loads(message.fields).items():
                if name in self.thoughts if name in THOUGHTS else called:
                    plain[name] = value
        return plain


def _common(first: str, second: str) -> int:
    """Count the characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
