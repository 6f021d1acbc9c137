"""Find a row's defects and apply the policies to them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import NoReturn

from alignkit.data.text.dialogue import (
    Dialogue,
    Message,
    common_prompt,
    doubled_roles,
    holds_label,
    without_labels,
)
from alignkit.data.text.policies import MEANING, Policies, Tally, choices
from alignkit.data.text.shapes import Side, side_of
from alignkit.data.text.thoughts import THOUGHTS
from alignkit.errors import AlignkitError

_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\ufffd\ufeff\u200b-\u200f\u202a-\u202e\u2060-\u2069\ue000-\uf8ff]")


class Dropped(Exception):
    """Report that a row is dropped by a policy and has been counted."""


class DefectError(AlignkitError):
    """Report a row whose defect's policy is ``error``.

    Args:
        told: What is wrong, and where.
        advice: Which policy would let the row pass, for commands that have policies.

    Example:
        >>> str(DefectError("a.jsonl:3: an answer is empty; mend the row", " or keep it"))
        'a.jsonl:3: an answer is empty; mend the row or keep it'
    """

    def __init__(self, told: str, advice: str = "") -> None:
        super().__init__(f"{told}{advice}")
        self.told = told


class Judge:
    """Apply the policies to the rows of one source.

    Args:
        source: The name that errors carry, ``source:line: …``.
        policies: What to do.
        tally: Where defects are counted; dropped rows count under ``dropped`` as well.
    """

    def __init__(self, source: str, policies: Policies, tally: Tally) -> None:
        self.source = source
        self.policies = policies
        self.tally = tally
        self._seen: set[bytes] = set()

    def count(self, name: str, line: int, detail: str = "", policy: str = "") -> str:
        """Count a defect and return its policy; ``policy`` is what ``auto`` comes to.

        Raises:
            AlignkitError: The policy is ``error``.
            Dropped: The policy is ``drop``.
        """
        self.tally.add(name, line)
        policy = policy or getattr(self.policies, name)
        if policy == "error":
            others = "|".join(each for each in choices(name) if each not in ("error", "auto"))
            told = f"{self.source}:{line}: {detail or MEANING[name]}; mend the row"
            raise DefectError(told, f" or set data.policies.{name} to {others}")
        if policy == "drop":
            self.drop(line)
        return policy

    def refuse(self, name: str, line: int, detail: str = "") -> NoReturn:
        """Count a defect that leaves nothing to keep.

        Raises:
            AlignkitError: The policy is ``error``.
            Dropped: Otherwise.
        """
        self.count(name, line, detail)
        self.drop(line)

    def unread(self, names: Sequence[str], line: int) -> None:
        """Count a row with fields that would change what is trained and are not read.

        Raises:
            AlignkitError, Dropped: As `count`.
        """
        if names:
            told = ", ".join(dict.fromkeys(names))
            detail = f"{told}: not read, and would change what is trained"
            self.count("unread_fields", line, detail)

    def key(self, text: str) -> bytes:
        """Return what `is_repeated` knows a prompt or a document by; empty where all are kept."""
        return b"" if self.policies.repeated_prompts == "keep" else prompt_key(text)

    def is_repeated(self, key: bytes, line: int) -> bool:
        """Count a prompt, or a document, that an earlier example had, and tell whether to drop it.

        It is asked of finished examples alone, in their order: what another policy drops is no
        earlier example, and other processes may have finished them.

        Raises:
            AlignkitError: The policy is ``error``.
        """
        if key and key in self._seen:
            with suppress(Dropped):
                self.count("repeated_prompts", line)
            return True
        if key:
            self._seen.add(key)
        return False

    def drop(self, line: int) -> NoReturn:
        """Count a row as dropped and leave it.

        Raises:
            Dropped: Always.
        """
        self.tally.add("dropped", line)
        raise Dropped

    def settle(self, sides: Sequence[Side], line: int) -> Dialogue:
        """Make one dialogue from a row's sides, by the policies.

        Raises:
            AlignkitError: A defect whose policy is ``error``.
            Dropped: A defect whose policy is ``drop``, or one that cannot be repaired.
        """
        found = defects(sides)
        self.unread([name for side in sides for name in side.unread], line)
        if "unwanted_answers" in found:
            self.count("unwanted_answers", line)
        if "control_characters" in found:
            self.count("control_characters", line)
            sides = [_readable_side(side) for side in sides]
        for name in ("unicode_oddities", "doubled_roles"):
            if name in found:
                self.count(name, line)
        dialogue = self._one_prompt(sides, found, line)
        answers = dialogue.answers
        if any(not answer.strip() for answer in answers):
            self.count("empty_answers", line)
        if len(set(answers)) < len(answers):
            self.count("identical_pairs", line)
        return dialogue

    def _one_prompt(self, sides: Sequence[Side], found: list[str], line: int) -> Dialogue:
        repair = False
        if "roles_inside_answer" in found:
            repair = self.count("roles_inside_answer", line) == "repair"
        if "differing_prompts" in found:
            repair |= self.count("differing_prompts", line) == "repair"
            sides = shared_prompt(sides)
            if not sides:
                self.drop(line)
            if not all(side.trained for side in sides):
                self.count("unwanted_answers", line)
        # What came apart is as its author meant it: only HH-RLHF's text has stray labels.
        sides = [
            side._replace(answer=without_labels(side.answer)) if repair and side.whole else side
            for side in sides
        ]
        first = sides[0]
        return Dialogue(
            first.prompt,
            tuple(side.answer for side in sides),
            first.starts,
            first.messages,
            tuple(side.reply for side in sides),
            first.continued,
            first.tools,
        )


def beyond_text(sides: Sequence[Side]) -> frozenset[str]:
    """Return what a row holds that not every format has a place for, as in `Format.reads`."""
    texts = {each.fields for side in sides for each in side.messages or ()}
    fields = {
        name
        for text in texts | {side.fields for side in sides}
        if text
        for name in json.loads(text)
    }
    return frozenset(fields.intersection(THOUGHTS) | {"tools" for side in sides if side.tools})


def defects(sides: Sequence[Side]) -> list[str]:
    """List the defects of a row as it was published, by the names in `MEANING`."""
    answers = [side.answer for side in sides]
    asked = {(side.prompt, side.messages) for side in sides}
    prompts = {(prompt, _spoken(messages or ())) for prompt, messages in asked}
    text = "\n".join([*(prompt for prompt, _ in prompts), *answers])
    found = {
        "unread_fields": any(side.unread for side in sides),
        "unwanted_answers": not all(side.trained for side in sides),
        "differing_prompts": len(prompts) > 1,
        "roles_inside_answer": any(holds_label(answer) for answer in answers),
        "empty_answers": any(not answer.strip() for answer in answers),
        "identical_pairs": len(prompts) == 1 and len(set(answers)) < len(answers),
        "doubled_roles": any(doubled_roles(*each) for each in asked),
    }
    return [*character_defects(text), *(name for name, present in found.items() if present)]


def shared_prompt(sides: Sequence[Side]) -> list[Side]:
    """Split the sides at the assistant's turn where their dialogues part; none without one."""
    if all(side.whole for side in sides):
        texts = tuple(side.prompt + side.answer for side in sides)
        shared = common_prompt(texts)
        if shared is None:
            return []
        return [Side(shared, text[len(shared) :], whole=True) for text in texts]
    whole = [
        (*side.messages, side.reply)
        for side in sides
        if side.messages is not None and side.content is not None
    ]
    if len(whole) < len(sides):
        return []
    columns = zip(*map(_spoken, whole), strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    answers = [dialogue[same : same + 1] for dialogue in whole]
    if not same or any(not answer or answer[0].role != "assistant" for answer in answers):
        return []
    return [
        side_of(dialogue[: same + 1])._replace(tools=side.tools)
        for side, dialogue in zip(sides, whole, strict=True)
    ]


def _spoken(messages: Sequence[Message]) -> tuple[tuple[str, str, str], ...]:
    return tuple((message.role, message.content, message.fields) for message in messages)


def _readable_side(side: Side) -> Side:
    messages = side.messages and tuple(
        message._replace(content=readable(message.content)) for message in side.messages
    )
    content = None if side.content is None else readable(side.content)
    return side._replace(
        prompt=readable(side.prompt),
        answer=readable(side.answer),
        continued=readable(side.continued),
        messages=messages,
        content=content,
    )


def readable(text: str) -> str:
    """Replace control characters by spaces and lone surrogates by U+FFFD, for the tokenizer."""
    return _UNREADABLE.sub(" ", _SURROGATE.sub("\ufffd", text))


def character_defects(text: str) -> list[str]:
    """List the defects of single characters that a text has."""
    patterns = {"control_characters": _UNREADABLE}
    if not text.isascii():  # most text is, and none of it is odd
        patterns["unicode_oddities"] = _ODD
    return [name for name, pattern in patterns.items() if pattern.search(text)]


def prompt_key(prompt: str) -> bytes:
    """Return a short key by which equal prompts are found."""
    return hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=16).digest()
