"""What is wrong with a row, and what to do about it: a policy per defect, and counts.

Nothing is dropped or changed without being counted, and the counts are logged once at the start
of a run.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

from alignkit.data.dialogue import (
    LABEL,
    Dialogue,
    common_prompt,
    doubled_roles,
    without_labels,
)
from alignkit.data.shapes import Side
from alignkit.errors import AlignkitError

_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\ufffd\ufeff\u200b-\u200f\u202a-\u202e\u2060-\u2069\ue000-\uf8ff]")

MEANING = {
    "bad_rows": "unreadable, or of the wrong shape",
    "control_characters": "NUL and other control characters, or half of a surrogate pair",
    "unicode_oddities": "U+FFFD, invisible, direction-changing or private-use characters",
    "differing_prompts": "the answers' prompts differ at the last `Assistant:`",
    "roles_inside_answer": "an answer holds `Human:` or `Assistant:`",
    "empty_answers": "an answer is empty",
    "identical_pairs": "two answers to compare are the same",
    "templated_text": "text that was rendered before: it holds a template's markers or EOS",
    "doubled_roles": "someone speaks twice in a row",
    "repeated_prompts": "the prompt has been seen in an earlier row",
    "too_long": "an answer alone exceeds max_length",
    "boundary": "prompt and answer encode differently together than apart",
    "truncated": "longer than max_length: the prompt loses its left end",
}
"""Every defect, in a few words; the report and the log use the same names."""


@dataclass(frozen=True)
class Policies:
    """What happens to a row with a defect: ``keep``, ``drop``, ``repair`` it, or ``error``.

    Attributes:
        bad_rows: A row that is not JSON, is not UTF-8, lacks a key or has no ``Assistant:``.
        control_characters: Repaired by a space for a control character, U+FFFD for half a
            surrogate pair (which no tokenizer can encode, so there is no keeping it).
        unicode_oddities: Kept: nobody knows what was meant instead.
        differing_prompts: In HH-RLHF one side holds a stray label, so the split falls in the
            wrong place. Both sides are split where they still agree; repaired, the answer then
            ends at its first stray label, kept, it runs on. Dropped where they never agree.
        roles_inside_answer: Repaired by taking a leading label off and ending the answer at a
            later one; training on it teaches the model to speak for the user.
        empty_answers: Dropped: an empty answer teaches silence. An empty document always goes.
        identical_pairs: Dropped: there is nothing to prefer.
        templated_text: Text that holds special tokens or a chat template's markers already, and
            would get them a second time; ``prompt_format: raw`` takes such text as it is.
            ``auto`` is ``error`` where a turn begins or ends with one, or would hold one that is
            read as special; a mere mention is text, and kept. Repaired by taking the tokens that
            end an answer off; where markers are left, the row goes. An EOS at an answer's or a
            document's end always goes, since one is added.
        doubled_roles: Kept; usual in HH-RLHF's prompts.
        repeated_prompts: Kept; ``drop`` keeps the first. For text, repeated documents. The only
            policy whose memory grows with the file, and only where it is not ``keep``.
        too_long: An answer longer than max_length is never cut, so its row can only go.
        boundary: A prompt whose ids change when the answer follows. ``auto`` is ``error``,
            except for the prompt format ``seed``, which cannot be had otherwise.
    """

    bad_rows: Literal["drop", "error"] = "error"
    control_characters: Literal["drop", "repair", "error"] = "repair"
    unicode_oddities: Literal["keep", "drop", "error"] = "keep"
    differing_prompts: Literal["keep", "drop", "repair", "error"] = "repair"
    roles_inside_answer: Literal["keep", "drop", "repair", "error"] = "repair"
    empty_answers: Literal["keep", "drop", "error"] = "drop"
    identical_pairs: Literal["keep", "drop", "error"] = "drop"
    templated_text: Literal["auto", "keep", "drop", "repair", "error"] = "auto"
    doubled_roles: Literal["keep", "drop", "error"] = "keep"
    repeated_prompts: Literal["keep", "drop", "error"] = "keep"
    too_long: Literal["drop", "error"] = "drop"
    boundary: Literal["auto", "keep", "drop", "error"] = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) not in choices(field.name):
                raise AlignkitError(
                    f"policies.{field.name}={getattr(self, field.name)!r}: "
                    f"choose one of {', '.join(choices(field.name))}"
                )


def choices(defect: str) -> tuple[str, ...]:
    """The policies a defect allows."""
    return get_args(Policies.__dataclass_fields__[defect].type)


class Tally:
    """Counts of rows by defect, and the lines where they stand.

    Args:
        lines_kept: How many line numbers to remember for each defect; ``None`` for all.
    """

    def __init__(self, lines_kept: int | None = 5) -> None:
        self._kept = lines_kept
        self.counts: dict[str, int] = {}
        self.lines: dict[str, list[int]] = {}

    def add(self, name: str, line: int) -> None:
        """Count one row."""
        self.counts[name] = self.counts.get(name, 0) + 1
        lines = self.lines.setdefault(name, [])
        if self._kept is None or len(lines) < self._kept:
            lines.append(line)

    def to_dict(self) -> dict[str, Any]:
        """Both, as JSON can hold them."""
        return {"counts": self.counts, "lines": self.lines}


class Dropped(Exception):
    """A row goes, by policy; it has been counted."""


class Judge:
    """Applies the policies to the rows of one source.

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
            raise AlignkitError(
                f"{self.source}:{line}: {detail or MEANING[name]}; "
                f"mend the row or set data.policies.{name} to {others}"
            )
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

    def repeated(self, text: str, line: int) -> None:
        """Count a prompt, or a document, that an earlier row had, unless these are all kept.

        Raises:
            AlignkitError, Dropped: As `count`.
        """
        if self.policies.repeated_prompts != "keep":
            key = prompt_key(text)
            if key in self._seen:
                self.count("repeated_prompts", line)
            self._seen.add(key)

    def drop(self, line: int) -> NoReturn:
        """Count a row as dropped and leave it.

        Raises:
            Dropped: Always.
        """
        self.tally.add("dropped", line)
        raise Dropped

    def settle(self, sides: Sequence[Side], line: int) -> Dialogue:
        """One dialogue from a row's sides, by the policies.

        Raises:
            AlignkitError: A defect whose policy is ``error``.
            Dropped: A defect whose policy is ``drop``, or one that cannot be repaired.
        """
        found = defects(sides)
        if "control_characters" in found:
            self.count("control_characters", line)
            sides = [
                side._replace(prompt=readable(side.prompt), answer=readable(side.answer))
                for side in sides
            ]
        for name in ("unicode_oddities", "doubled_roles"):
            if name in found:
                self.count(name, line)
        dialogue = self._one_prompt(sides, found, line)
        answers = dialogue.answers
        if any(not answer.strip() for answer in answers):
            self.count("empty_answers", line)
        if len(set(answers)) < len(answers):
            self.count("identical_pairs", line)
        self.repeated(dialogue.prompt, line)
        return dialogue

    def _one_prompt(self, sides: Sequence[Side], found: list[str], line: int) -> Dialogue:
        prompt, _, starts = sides[0]
        answers = [side.answer for side in sides]
        repair = False
        if "roles_inside_answer" in found:
            repair = self.count("roles_inside_answer", line) == "repair"
        if "differing_prompts" in found:
            repair |= self.count("differing_prompts", line) == "repair"
            shared = common_prompt(tuple(side.prompt + side.answer for side in sides))
            if shared is None:
                self.drop(line)
            prompt, starts = shared, None
            answers = [(side.prompt + side.answer)[len(shared) :] for side in sides]
        if repair:
            answers = [without_labels(answer) for answer in answers]
        return Dialogue(prompt, tuple(answers), starts)


def defects(sides: Sequence[Side]) -> list[str]:
    """The defects of a row as it was published, by the names in `MEANING`."""
    answers = [side.answer for side in sides]
    prompts = {side.prompt for side in sides}
    text = "\n".join([*prompts, *answers])
    found = {
        "differing_prompts": len(prompts) > 1,
        "roles_inside_answer": any(LABEL.search(answer) for answer in answers),
        "empty_answers": any(not answer.strip() for answer in answers),
        "identical_pairs": len(prompts) == 1 and len(set(answers)) < len(answers),
        "doubled_roles": any(doubled_roles(prompt) for prompt in prompts),
    }
    return [*character_defects(text), *(name for name, present in found.items() if present)]


def readable(text: str) -> str:
    """Text a tokenizer can encode: control characters as spaces, lone surrogates as U+FFFD."""
    return _UNREADABLE.sub(" ", _SURROGATE.sub("\ufffd", text))


def character_defects(text: str) -> list[str]:
    """Which defects of single characters a text has."""
    patterns = {"control_characters": _UNREADABLE}
    if not text.isascii():  # most text is, and none of it is odd
        patterns["unicode_oddities"] = _ODD
    return [name for name, pattern in patterns.items() if pattern.search(text)]


def prompt_key(prompt: str) -> bytes:
    """A short key by which equal prompts are found."""
    return hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=16).digest()
