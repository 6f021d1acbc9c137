"""Find text that was rendered before, and so holds a template's markers or EOS already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from alignkit.data.text.chat import ChatTemplate
from alignkit.data.text.chat_templates import own_template
from alignkit.data.text.defects import Judge
from alignkit.data.text.dialogue import ASSISTANT, HUMAN, Message
from alignkit.data.text.shapes import Side
from alignkit.errors import AlignkitError
from alignkit.models.tokenizer import special_tokens

_KNOWN = r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
"""Markers of the chat templates people use, whatever the tokenizer."""

_KNOWN_EDGES = ("<s>", "</s>", "<bos>", "<eos>")
"""Tokens that tell something where a turn begins or ends; ``<s>`` is HTML elsewhere."""

_HEADERS = (
    ("### Instruction:", "### Response:"),
    ("USER:", "ASSISTANT:"),
    ("User:", "Assistant:"),
    ("<human>:", "<bot>:"),
    (HUMAN, ASSISTANT),
)
"""What templates without special tokens write before a question and before its answer."""

_ROLE = rf"(?:{HUMAN}|{ASSISTANT})"
_LABEL_TWICE = re.compile(rf"\s*{_ROLE}\s*{_ROLE}")
_QUESTION = "a question to alignkit"
_LAST_LABEL = f"\n\n{ASSISTANT}"


class Sign(NamedTuple):
    """Hold what shows that a text was rendered before.

    Example:
        >>> sign = Templated().find_in_document("[INST] What is 2 + 2? [/INST] 4")
        >>> sign.told, sign.grave
        ("the text holds '[INST]', which is read as text", False)

    Attributes:
        told: A few words for the message.
        grave: Whether training on it would be wrong: markers would come twice, or a token in the
            middle of the text would be read as special. Elsewhere it is a mention, and text.
    """

    told: str
    grave: bool


class Templated:
    """Find text that was rendered before.

    Args:
        tokenizer: Its special tokens and its chat template's markers are looked for; without one,
            those of well-known templates alone.
        specials: Whether the text is encoded so that special tokens in it are read as such.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, *, specials: bool = False
    ) -> None:
        own = _telling(special_tokens(tokenizer)) if tokenizer else []
        marks = "|".join([*map(re.escape, own), _KNOWN])
        edges = "|".join([marks, *map(re.escape, _KNOWN_EDGES)])
        self._own = frozenset(own) if specials else frozenset()
        self._mention = re.compile(marks)
        self._any = re.compile(edges)
        self._at_an_edge = re.compile(rf"(?:{_ROLE}|\A)\s*({edges})|({edges})\s*(?:\n\n{_ROLE}|\Z)")
        self._last = re.compile(rf"(?:{edges})\Z")
        self._first = sorted({*(token[0] for token in own), "<", "["})
        self._bos = self._eos = re.compile(r"(?!)")  # nothing
        headers = [*_HEADERS]
        if tokenizer:
            headers += filter(None, [_own_headers(tokenizer)])
            if tokenizer.bos_token in own:
                self._bos = re.compile(rf"\s*{re.escape(str(tokenizer.bos_token))}")
            if tokenizer.eos_token in own:
                self._eos = re.compile(rf"{re.escape(str(tokenizer.eos_token))}\Z")
        # In HH-RLHF's own text its labels are where turns begin.
        others = [pair for pair in headers if pair[1] != ASSISTANT]
        self._headers = {apart: headers if apart else others for apart in (True, False)}
        self._labels = {apart: tuple(a for _, a in pairs) for apart, pairs in self._headers.items()}

    def find(self, sides: Sequence[Side]) -> Sign | None:
        """Find the gravest sign that a row's text was rendered before; ``None`` for nothing."""
        least: Sign | None = None
        for side in sides:
            for sign in (self._label(side), self._mark(side)):
                if sign is not None and sign.grave:
                    return sign
                least = least or sign
        return least

    def settle(self, sides: Sequence[Side], judge: Judge, line: int) -> Sequence[Side]:
        """Apply the policy ``templated_text`` to a row.

        Whatever it is, an EOS that ends an answer goes, since one is added.

        Raises:
            AlignkitError: The policy is ``error`` and the row was rendered before.
            Dropped: It is ``drop``, or the row cannot be repaired.
        """
        sign = self.find(sides)
        if sign is None:
            return sides
        policy: str = judge.policies.templated_text
        if policy == "auto":
            policy = "error" if sign.grave else "keep"
        detail = f"{sign.told}, as if rendered already; data.prompt_format=raw takes it as it is"
        judge.count("templated_text", line, detail, policy)
        if policy == "repair":
            sides = [_stripped(self._last, side) for side in sides]
            left = self.find(sides)
            if left is not None and left.grave:
                judge.drop(line)
        return [_stripped(self._eos, side) for side in sides]

    def find_in_document(self, text: str) -> Sign | None:
        """Find a sign in a document, in which special tokens are never read as such."""
        found = self._mention.search(text)
        return Sign(f"the text holds {found[0]!r}, which is read as text", False) if found else None

    def settle_document(self, text: str, judge: Judge, line: int) -> str:
        """Apply the policy to a document, and take BOS and EOS off its ends.

        Raises:
            AlignkitError, Dropped: By the policy.
        """
        sign = self.find_in_document(text)
        if sign is None:
            return text
        judge.count("templated_text", line, sign.told)
        while start := self._bos.match(text):
            text = text[start.end() :]
        return _without(self._eos, text)

    def _mark(self, side: Side) -> Sign | None:
        """Find a template's marker where a turn begins or ends, or anywhere else."""
        text = side.prompt + side.answer
        if not any(first in text for first in self._first) or not self._any.search(text):
            return None
        if found := self._at_an_edge.search(text):
            return Sign(f"a turn begins or ends with {found[1] or found[2]!r}", True)
        marks = list(dict.fromkeys(self._mention.findall(text)))
        if not marks:
            return None
        read = [mark for mark in marks if mark in self._own]
        return Sign(f"the text holds {(read or marks)[0]!r}", bool(read))

    def _label(self, side: Side) -> Sign | None:
        """Find a template's labels around a question or before an answer, in the text itself."""
        apart = side.starts is not None
        labels = self._labels[apart]
        body = side.prompt.removesuffix(_LAST_LABEL).rstrip()
        if body.endswith(labels):
            question = body.lstrip().removeprefix(HUMAN)
            for before, after in self._headers[apart]:
                if body.endswith(after) and before in question[: -len(after)]:
                    return Sign(f"the prompt holds {before!r} and ends with {after!r}", True)
        answer = side.answer.lstrip()
        if answer.startswith(labels):
            label = next(each for each in labels if answer.startswith(each))
            return Sign(f"an answer begins with {label!r}", True)
        for start in side.starts or ():
            if found := _LABEL_TWICE.match(side.prompt, start):
                return Sign(f"a message begins with {found[0].split()[-1]!r}", True)
        return None


def _own_headers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Find what the chat template writes right before a question and before its answer.

    Returns:
        Both without white space and special tokens; ``None`` without a template, or where it
        writes nothing else.
    """
    template = own_template(tokenizer)
    if template is None:
        return None
    try:
        text = ChatTemplate(tokenizer, template).apply(
            [Message("user", _QUESTION)], add_generation_prompt=True
        )
    except AlignkitError:
        return None
    before, _, after = text.partition(_QUESTION)
    edges = re.compile("|".join([*map(re.escape, special_tokens(tokenizer)), r"\n"]))
    header, label = (edges.split(part.strip())[-1].strip() for part in (before, after))
    if min(len(header), len(label)) <= 2 or label.isalnum():  # words that people write
        return None
    return header, label


def _telling(tokens: Iterable[str]) -> list[str]:
    """Return the special tokens that nobody writes by chance, the longest first."""
    labels = f"\n\n{HUMAN}{_LAST_LABEL}"
    telling = (
        token
        for token in tokens
        if len(token.strip()) > 2 and not token.strip().isalnum() and token not in labels
    )
    return sorted(telling, key=len, reverse=True)


def _stripped(end: re.Pattern[str], side: Side) -> Side:
    """Remove a token from the end of a side's answer, as text and as a message's content."""
    content = side.content if side.content is None else _without(end, side.content)
    return side._replace(answer=_without(end, side.answer), content=content)


def _without(end: re.Pattern[str], text: str) -> str:
    while found := end.search(text.rstrip()):
        text = text[: found.start()].rstrip()
    return text
