r"""Read HH-RLHF dialogues: their labels, their turns, and the split into prompt and answer.

A dialogue is published as one text, ``\n\nHuman: …\n\nAssistant: …``. Text is never rewritten
on the way: a prompt ends right after its last ``Assistant:`` and the answer keeps the space that
follows, so prompt + answer is the published text, character for character, and its tokens are
the same whether the two are encoded together or apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import NamedTuple

HUMAN = "Human:"
ASSISTANT = "Assistant:"

_ROLES = {"Human": "user", "Assistant": "assistant"}

_FIRST_TURN = re.compile(r"\s*(Human|Assistant):")
_TURN = re.compile(r"\n\r?\n(Human|Assistant):")
"""A label that opens a turn, after an empty line; the first may open the text."""

_LEADING = re.compile(r"\s*(?:Human|Assistant):")
_STRAY = re.compile(r"\n[ \t]*(Human|Assistant):")
"""A label that opens an answer, or a later line of it: where none belongs."""


class RowError(ValueError):
    """Report a row of the wrong shape; the message says what it lacks, without its place."""


class Turn(NamedTuple):
    """Hold one turn of a dialogue: its speaker, its text, and where its label begins.

    Spaces of the text are kept.

    Example:
        >>> Turn("Human", " What is 2 + 2?", 0).text
        ' What is 2 + 2?'
    """

    role: str
    text: str
    start: int


class Message(NamedTuple):
    """Hold one message of a chat.

    Example:
        >>> message = Message("user", "What is 2 + 2?")
        >>> message.role, message.trained
        ('user', True)

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: What the row gave, as it is. Calls of tools stand in it as text.
        trained: Whether it may carry loss, where all turns do.
        fields: JSON of what a chat template that knows it gets instead or besides:
            ``{"content": null, "tool_calls": [...]}``, ``{"reasoning_content": "2 and 2 …"}``.
    """

    role: str
    content: str
    trained: bool = True
    fields: str = ""


@dataclass(frozen=True)
class Dialogue:
    r"""Hold a prompt and the answers to it.

    Example:
        >>> dialogue = Dialogue("\n\nHuman: What is 2 + 2?\n\nAssistant:", (" 4", " 5"))
        >>> [reply.content for reply in dialogue.said()]
        ['4', '5']

    Attributes:
        prompt: The text up to and including the last ``Assistant:``.
        answers: One text an answer, each beginning with the space that follows the label.
        starts: Where the prompt's turns begin, where the row said so itself (``messages``);
            ``None`` means wherever `turns` finds a label.
        messages: The prompt as the row gave it, where it gave messages: one for each of
            ``starts`` but the last, which is the answer's own label, and a system message.
        replies: Each answer as a message; ``None`` means its text, stripped.
        continued: The assistant's words that end the prompt, where an answer goes on with them;
            in ``replies`` they stand too.
        tools: JSON of the tools that the assistant may call; empty for none.
    """

    prompt: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    replies: tuple[Message, ...] | None = None
    continued: str = ""
    tools: str = ""

    def turn_starts(self) -> tuple[int, ...]:
        """Return the offsets in the prompt at which a turn begins, the answer's own label last."""
        if self.starts is not None:
            return self.starts
        return tuple(turn.start for turn in turns(self.prompt))

    def opening(self) -> str:
        """Return what stands before the first turn; empty where nothing does, or without a turn."""
        if self.starts is not None:
            return self.prompt[: self.starts[0]].strip() if self.starts else ""
        first = _FIRST_TURN.match(self.prompt) or _TURN.search(self.prompt)
        return self.prompt[: first.start()].strip() if first else ""

    def since(self, start: int) -> str:
        """Return the prompt from the turn at ``start`` on; text before the first turn stays."""
        first = (self.turn_starts() or (0,))[0] if start else 0
        return self.prompt[:first] + self.prompt[start:]

    def history(self, start: int = 0) -> list[Message]:
        """Return the prompt as messages, from the turn at ``start`` on.

        The system's message, which is the text before the first turn, stays with a shortened
        dialogue.
        """
        starts = self.turn_starts()
        messages = self.messages
        if messages is None:
            stripped = [m._replace(content=m.content.strip()) for m in messages_of(self.prompt)]
            if not starts:
                stripped = []
            elif stripped[-1].role == "assistant" or not stripped[-1].content:
                stripped.pop()  # it asks for the answer, or is the answer's beginning
            messages = tuple(m for m in stripped if m.content or m.role != "system")
        led = int(bool(messages) and messages[0].role == "system")
        dropped = sum(at < start for at in starts)
        return [*messages[:led], *messages[led + dropped :]]

    def answered(self, start: int = 0) -> list[tuple[int, int]]:
        """Return the assistant's parts of the prompt that are trained on, from ``start`` on.

        Returns:
            Where each begins, right after its label, and where it ends.
        """
        spoken = [message for message in self.history() if message.role != "system"]
        return [
            (self.prompt.index(ASSISTANT, begin) + len(ASSISTANT), end)
            for (begin, end), message in zip(pairwise(self.turn_starts()), spoken, strict=False)
            if message.role == "assistant" and message.trained and begin >= start
        ]

    def said(self) -> tuple[Message, ...]:
        """Return each answer as a message."""
        return self.replies or tuple(
            Message("assistant", (self.continued + answer).strip()) for answer in self.answers
        )


def split_last(text: str) -> tuple[str, str]:
    """Split a dialogue right after the label that opens the assistant's last turn.

    Returns:
        The prompt, label included, and the answer, which may be empty.

    Raises:
        RowError: The assistant has no turn.
    """
    at = last_label(text)
    if at is None:
        where = " that opens a turn, after an empty line" if ASSISTANT in text else ""
        raise RowError(f"the dialogue has no `{ASSISTANT}`{where}")
    return text[:at], text[at:]


def last_label(text: str) -> int | None:
    """Find the end of the label that opens the assistant's last turn; ``None`` without one."""
    at = len(text)
    # From the end: a split needs one label, and the text before it may be long.
    while (at := text.rfind(ASSISTANT, 0, at)) >= 0:
        if text.endswith(("\n\n", "\n\r\n"), 0, at) or not text[:at].strip():
            return at + len(ASSISTANT)
    return None


def turns(text: str) -> list[Turn]:
    """Return the turns of a dialogue, by the labels that follow an empty line.

    Text before the first label belongs to no turn. A label elsewhere in a line opens no turn:
    people write "Human:" in the middle of a sentence.
    """
    marks = _turn_marks(text)
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    return [
        Turn(mark[1], text[mark.end() : end], mark.start())
        for mark, end in zip(marks, ends, strict=False)
    ]


def messages_of(text: str) -> list[Message]:
    r"""Read HH-RLHF's text as messages, whose contents keep every space and line break.

    What stands before the first turn is the system's message.

    Example:
        >>> messages_of("\n\nHuman: 2 + 2?\n\nAssistant: 4")[1]
        Message(role='assistant', content=' 4', trained=True, fields='')
    """
    found = turns(text)
    opening = text[: found[0].start] if found else text
    spoken = [Message(_ROLES[turn.role], turn.text) for turn in found]
    return [Message("system", opening), *spoken] if opening else spoken


def text_of(messages: Sequence[Message]) -> str:
    """Write what `messages_of` has read: the same text, where an empty line leads every label."""
    labels = {role: f"\n\n{label}:" for label, role in _ROLES.items()}
    return "".join(labels.get(message.role, "") + message.content for message in messages)


def doubled_roles(prompt: str, messages: Sequence[Message] | None = None) -> bool:
    """Tell whether someone speaks twice in a row, the answer to the prompt included."""
    if messages is None:
        roles = [mark[1] for mark in _turn_marks(prompt)]
    else:
        roles = [each.role for each in messages if each.role != "system"] + ["assistant"]
    return any(first == second for first, second in pairwise(roles))


def _turn_marks(text: str) -> list[re.Match[str]]:
    # Two patterns, as one that begins with a plain line break is searched for several times faster.
    first = _FIRST_TURN.match(text)
    rest = _TURN.finditer(text, first.end() if first else 0)
    return [first, *rest] if first else list(rest)


def common_prompt(texts: tuple[str, ...]) -> str | None:
    """Return the longest prompt that all dialogues share, which ends with ``Assistant:``.

    Where prompts differ at the last label, one side usually holds a stray turn in the middle
    of its answer; this finds the prompt the two sides were really written for.

    Returns:
        The prompt, or ``None`` where the texts part before any turn of the assistant.
    """
    same = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    shared = texts[0][: sum(1 for _ in same)]
    at = last_label(shared)
    return None if at is None else shared[:at]


def holds_label(answer: str) -> bool:
    """Tell whether a role's label opens the answer or a line of it."""
    return bool(_LEADING.match(answer) or _STRAY.search(answer))


def without_labels(answer: str) -> str:
    """Return an answer of HH-RLHF without stray role labels.

    A label that opens the answer is taken off (``Assistant: Human: I think …`` is an answer
    mislabelled); at one that opens a later line the answer ends, since what follows is someone
    else's turn. Where that turn is the assistant's own, the human's before it has lost its
    empty line: a ``Human:`` in the middle of a line is then where the answer ends.
    """
    while stray := _LEADING.match(answer):
        answer = " " + answer[stray.end() :].lstrip()
    mark = _STRAY.search(answer)
    if mark is None:
        return answer
    asked = answer.find(HUMAN, 0, mark.start()) if mark[1] == "Assistant" else -1
    return answer[: asked if asked >= 0 else mark.start()].rstrip()
