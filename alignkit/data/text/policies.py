"""Define the defects that a row may have and a policy for each, and count them.

Nothing is dropped or changed without being counted, and the counts are logged once at the start
of a run.
"""

from bisect import insort
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, Self, get_args

from alignkit.errors import AlignkitError

MEANING = {
    "bad_rows": "unreadable, or of the wrong shape",
    "control_characters": "NUL and other control characters, or half of a surrogate pair",
    "unicode_oddities": "U+FFFD, invisible, direction-changing or private-use characters",
    "unread_fields": "a field that would change what is trained, and is not read",
    "unwritten_tools": "tools that the chat template has no place for",
    "unwritten_thoughts": "a trained turn's thought that the chat template leaves out",
    "unwanted_answers": "marked as not to be trained on (`label` false, `weight` 0)",
    "differing_prompts": "the answers' prompts differ at the last `Assistant:`",
    "roles_inside_answer": "`Human:` or `Assistant:` opens an answer or a line of it",
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
    """Declare what happens to a row with a defect: ``keep``, ``drop``, ``repair`` or ``error``.

    Example:
        >>> Policies(empty_answers="keep").empty_answers
        'keep'
        >>> choices("empty_answers")
        ('keep', 'drop', 'error')

    Attributes:
        bad_rows: A row that is not JSON, is not UTF-8, lacks a key or has no ``Assistant:``.
        control_characters: Repaired by a space for a control character, U+FFFD for half a
            surrogate pair (which no tokenizer can encode, so there is no keeping it).
        unicode_oddities: Kept: nobody knows what was meant instead.
        unread_fields: ``images``, ``tools`` without a chat template, a weight between 0 and 1,
            whatever a message holds that is not known (see `alignkit.data.text.fields`). Kept, the
            field is ignored.
        unwritten_tools: Tools that may be called, where the tokenizer's chat template does not
            write them. Kept, the text is without them, as transformers renders it. The other
            formats have no place for any, so that there they are ``unread_fields``.
        unwritten_thoughts: A turn's thought (``reasoning_content``, ``thinking``, or before
            ``</think>``) that the chat template leaves out where the turn is trained on, as many
            do before a later question. Kept, the text is without it, as transformers renders it.
            A field of thoughts that a template never reads is among the ``unread_fields``.
        unwanted_answers: Dropped, as whoever marked it asked.
        differing_prompts: In HH-RLHF one side holds a stray turn, so the split falls in the
            wrong place. Both sides are split where they still agree; repaired, the answer then
            ends at its first stray label, kept, it runs on. Dropped where they never agree.
            Messages are split at the first that differs, and an answer is one message.
        roles_inside_answer: Training on it teaches the model to speak for the user. In the whole
            dialogues of HH-RLHF it is repaired, by taking a leading label off and ending the
            answer at one that opens a later line; an answer that came apart is as it was meant.
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
            except for the prompt format ``stripped``, which cannot be had otherwise.
    """

    bad_rows: Literal["drop", "error"] = "error"
    control_characters: Literal["drop", "repair", "error"] = "repair"
    unicode_oddities: Literal["keep", "drop", "error"] = "keep"
    unread_fields: Literal["keep", "drop", "error"] = "error"
    unwritten_tools: Literal["keep", "drop", "error"] = "keep"
    unwritten_thoughts: Literal["keep", "drop", "error"] = "keep"
    unwanted_answers: Literal["drop", "error"] = "drop"
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


@cache
def choices(defect: str) -> tuple[str, ...]:
    """Return the policies that a defect allows."""
    return get_args(Policies.__dataclass_fields__[defect].type)


DEFAULTS = Policies()
"""What happens to each defect unless something else is said."""


class Tally:
    """Count rows by defect, with the lines where they stand and the columns not read.

    Args:
        lines_kept: How many line numbers to remember for each defect, the lowest; ``None`` for all.

    Attributes:
        columns: Names of the rows' columns that nothing is read from.
        shapes: How many rows were read as each shape.
    """

    def __init__(self, lines_kept: int | None = 5) -> None:
        self._kept = lines_kept
        self.counts: dict[str, int] = {}
        self.lines: dict[str, list[int]] = {}
        self.columns: set[str] = set()
        self.shapes: dict[str, int] = {}

    def add(self, name: str, line: int) -> None:
        """Count one row."""
        self.counts[name] = self.counts.get(name, 0) + 1
        lines = self.lines.setdefault(name, [])
        if self._kept is None or len(lines) < self._kept or line < lines[-1]:
            insort(lines, line)
            if self._kept is not None:
                del lines[self._kept :]

    def read_as(self, shape: str) -> None:
        """Count one row by the shape it was read as; an empty name says nothing."""
        if shape:
            self.shapes[shape] = self.shapes.get(shape, 0) + 1

    def merge(self, other: Self) -> None:
        """Add what another tally counted of the same source."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
            lines = sorted([*self.lines.get(name, []), *other.lines[name]])
            self.lines[name] = lines[: self._kept]
        self.columns |= other.columns
        for shape, count in other.shapes.items():
            self.shapes[shape] = self.shapes.get(shape, 0) + count

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, lines, columns and shapes as JSON can hold them, sorted by name."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "lines": dict(sorted(self.lines.items())),
            "columns": sorted(self.columns),
            "shapes": dict(sorted(self.shapes.items())),
        }
