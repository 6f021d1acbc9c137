r"""HH-RLHF dialogues as plain functions: labels, turns, and the split into prompt and answer.

A dialogue is published as one text, ``\n\nHuman: …\n\nAssistant: …``. Text is never rewritten
on the way: a prompt ends right after its last ``Assistant:`` and the answer keeps the space that
follows, so prompt + answer is the published text, character for character, and its tokens are
the same whether the two are encoded together or apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import NamedTuple

HUMAN = "Human:"
ASSISTANT = "Assistant:"

LABEL = re.compile(r"(?:Human|Assistant):")
"""A role's label, wherever it stands; inside an answer it is a defect."""

_FIRST_TURN = re.compile(r"\s*(Human|Assistant):")
_TURN = re.compile(r"\n\n(Human|Assistant):")
"""A label that opens a turn, after an empty line; the first may open the text."""


class RowError(ValueError):
    """A row of the wrong shape; the message says what it lacks, without its place."""


class Turn(NamedTuple):
    """One turn of a dialogue: who speaks, what (spaces kept), and where its label begins."""

    role: str
    text: str
    start: int


@dataclass(frozen=True)
class Dialogue:
    """A prompt and the answers to it.

    Attributes:
        prompt: The text up to and including the last ``Assistant:``.
        answers: One text an answer, each beginning with the space that follows the label.
        starts: Where the prompt's turns begin, where the row said so itself (``messages``);
            ``None`` means wherever `turns` finds a label.
    """

    prompt: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] | None = None

    def turn_starts(self) -> tuple[int, ...]:
        """Offsets into the prompt at which a turn begins, the answer's own label last."""
        if self.starts is not None:
            return self.starts
        return tuple(turn.start for turn in turns(self.prompt))

    def since(self, start: int) -> str:
        """The prompt from the turn at ``start`` on; text before the first turn stays."""
        first = (self.turn_starts() or (0,))[0] if start else 0
        return self.prompt[:first] + self.prompt[start:]


def split_last(text: str) -> tuple[str, str]:
    """Split a dialogue right after its last ``Assistant:``.

    Returns:
        The prompt, label included, and the answer, which may be empty.

    Raises:
        RowError: There is no ``Assistant:``.
    """
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise RowError("the dialogue has no `Assistant:`")
    at += len(ASSISTANT)
    return text[:at], text[at:]


def turns(text: str) -> list[Turn]:
    """The turns of a dialogue, by the labels that follow an empty line.

    Text before the first label belongs to no turn. A label elsewhere in a line opens no turn:
    people write "Human:" in the middle of a sentence.
    """
    marks = _turn_marks(text)
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    return [
        Turn(mark[1], text[mark.end() : end], mark.start())
        for mark, end in zip(marks, ends, strict=False)
    ]


def doubled_roles(text: str) -> bool:
    """Whether someone speaks twice in a row."""
    roles = [mark[1] for mark in _turn_marks(text)]
    return any(first == second for first, second in pairwise(roles))


def _turn_marks(text: str) -> list[re.Match[str]]:
    # Two patterns, as one that begins with a plain line break is searched for several times faster.
    first = _FIRST_TURN.match(text)
    rest = _TURN.finditer(text, first.end() if first else 0)
    return [first, *rest] if first else list(rest)


def common_prompt(texts: tuple[str, ...]) -> str | None:
    """The longest prompt that all dialogues share: their common start up to an ``Assistant:``.

    Where prompts differ at the last label, one side usually holds a stray label in the middle
    of its answer; this finds the prompt the two sides were really written for.

    Returns:
        The prompt, or ``None`` where the texts part before any ``Assistant:``.
    """
    same = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    shared = texts[0][: sum(1 for _ in same)]
    at = shared.rfind(ASSISTANT)
    return shared[: at + len(ASSISTANT)] if at >= 0 else None


def without_labels(answer: str) -> str:
    """An answer without stray role labels.

    A label that opens the answer is taken off (``Assistant: Human: I think …`` is an answer
    mislabelled); at a later one the answer ends, since what follows is someone else's turn.
    """
    stray = LABEL.match(answer.lstrip())
    while stray:
        answer = " " + answer.lstrip()[stray.end() :].lstrip()
        stray = LABEL.match(answer.lstrip())
    mark = LABEL.search(answer)
    return answer[: mark.start()].rstrip() if mark else answer
