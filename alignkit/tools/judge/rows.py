"""Read the rows of a file as answers to judge, whatever scores they have already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.rows import BadRow, Rows, Source
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.policies import Tally
from alignkit.data.text.ranked import SAMPLED, without_scores
from alignkit.data.text.recognise import renamed
from alignkit.data.text.shapes import sft_sides
from alignkit.data.text.templated import Templated

_LINES_SHOWN = 5
_SAMPLED = {"responses": SAMPLED}
_RENDERED = Templated()


@dataclass
class LeftOut:
    """Count what is not judged, or not as it stands.

    Example:
        >>> str(LeftOut(cut=2, max_length=64))
        ', 2 prompts cut to max_length=64'

    Attributes:
        max_length: Most tokens of a prompt with one answer.
        keeps_unended: Whether answers stay that the model had not ended.
        keeps_templated: Whether those stay that look rendered, as with ``prompt_format=raw``.
        sampled: Whether the rows are those of ``alignkit sample``.
        empty: How many answers of a row are empty, by file and line.
        repeated: How many are there before.
        templated: How many begin with a role's label or hold a template's markers at an end, which
            training would take for a second one.
        cut: How many prompts lost their left end.
        unended: How many answers of a row the model had not ended, by file and line.
        short: Where rows have not two answers that it had ended, if the others do not stay.
        dropped: Lines of the rows that a policy drops.
    """

    max_length: int = 0
    keeps_unended: bool = True
    keeps_templated: bool = False
    sampled: bool = False
    empty: dict[tuple[str, int], int] = field(default_factory=dict)
    repeated: dict[tuple[str, int], int] = field(default_factory=dict)
    templated: dict[tuple[str, int], int] = field(default_factory=dict)
    cut: int = 0
    unended: dict[tuple[str, int], int] = field(default_factory=dict)
    short: set[tuple[str, int]] = field(default_factory=set)
    dropped: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        """Return what a sentence says about it, nothing where there is none."""
        told = ""
        kinds = {"empty": self.empty, "repeated": self.repeated, "templated": self.templated}
        for kind, rows in kinds.items():
            if count := sum(rows.values()):
                told += f", {count:,} {kind} answer{'s' if count > 1 else ''} left out"
        if self.cut:
            several = "s" if self.cut > 1 else ""
            told += f", {self.cut:,} prompt{several} cut to max_length={self.max_length}"
        if count := sum(self.unended.values()):
            is_one = count == 1
            told += f", {count:,} answer{' was' if is_one else 's were'} cut at max_new_tokens and "
            told += (
                f"would be trained as if {'it' if is_one else 'they'} ended there"
                if self.keeps_unended
                else "left out"
            )
        if count := len(self.short):
            told += f", {count:,} row{'s' if count > 1 else ''} without two others left out"
        if self.dropped:
            more = ", …" if self.dropped[_LINES_SHOWN:] else ""
            listed = ", ".join(map(str, self.dropped[:_LINES_SHOWN])) + more
            audit = f"alignkit audit{f' --columns.responses {SAMPLED}' if self.sampled else ''}"
            told += f", dropped {len(self.dropped):,} (line {listed}; {audit} says why)"
        return told


def rows_to_judge(
    sources: Sequence[Source], columns: Mapping[str, str] | None, left_out: LeftOut
) -> list[Source]:
    """Return rows with all their answers, in the order of the scores that they have.

    Of rows that ``alignkit sample`` wrote, only one of each text is there, no empty one and none
    that begins with ``Assistant:``, as long as two remain: a model that gives short answers, or
    begins some as a dialogue does, would lose most of its rows otherwise.

    Args:
        sources: The rows.
        columns: The rows' columns by the names that are read; ``None`` where they have these.
        left_out: Gets what is left out.
    """
    left_out.sampled = columns is None and _is_sampled(sources)
    names = _SAMPLED if left_out.sampled else columns

    def read(source: Source) -> Rows:
        for line, row in source.rows():
            if not isinstance(row, BadRow):
                try:
                    row = without_scores(renamed(row, names))
                except RowError as error:
                    row = BadRow(str(error))
                else:
                    if left_out.sampled and isinstance(row["responses"], list):
                        distinct = _distinct(row, (source.name, line), left_out)
                        if distinct is None:
                            continue
                        row = distinct
            yield line, row

    return [replace(source, rows=partial(read, source)) for source in sources]


def drafts_to_judge(
    sources: Sequence[Source], encoder: DialogueEncoder, left_out: LeftOut
) -> Iterator[DraftExample]:
    """Yield the rows, and add what policies drop and ``max_length`` cuts to ``left_out``."""
    left_out.max_length = encoder.max_length
    for source in sources:
        tally = Tally(lines_kept=None)
        kept = set()
        for draft in encoder.drafts(source, tally):
            kept.add(draft.line)
            yield draft
        left_out.cut += tally.counts.get("truncated", 0)
        left_out.dropped += sorted(set(tally.lines.get("rows", ())) - kept)
        for place in [p for p in left_out.unended if p[0] == source.name and p[1] not in kept]:
            del left_out.unended[place]


def _is_sampled(sources: Sequence[Source]) -> bool:
    """Tell whether rows are those of ``alignkit sample``."""
    first = next((row for source in sources for _, row in source.rows()), {})
    return not isinstance(first, BadRow) and SAMPLED in first


def _distinct(
    row: Mapping[str, Any], place: tuple[str, int], left_out: LeftOut
) -> Mapping[str, Any] | None:
    """Return a row with the answers that are judged; ``None`` if too few of them can be."""
    drawn = row["responses"]
    notes: Any = row.get("drawn")
    said = [answer for answer in drawn if str(answer).strip()]
    plain = said
    if not left_out.keeps_templated:
        plain = [answer for answer in said if not _is_templated(row["prompt"], answer)]
    distinct = {str(answer).strip(): answer for answer in reversed(plain)}
    empty, templated = len(drawn) - len(said), len(said) - len(plain)
    repeated = len(plain) - len(distinct)
    unended = _texts_without_end(drawn, notes if isinstance(notes, list) else [])
    left_out.unended[place] = len(unended)
    if unended and not left_out.keeps_unended:
        distinct = {text: answer for text, answer in distinct.items() if text not in unended}
        if len(distinct) < 2:
            left_out.short.add(place)
            return None
    if templated and len(distinct) < 2:
        left_out.templated[place] = templated
        left_out.short.add(place)
        return None
    if len(distinct) < 2 or len(distinct) == len(drawn):
        return row
    left_out.empty[place], left_out.repeated[place] = empty, repeated
    left_out.templated[place] = templated
    return {**row, "responses": [*distinct.values()][::-1]}


def _is_templated(prompt: Any, answer: Any) -> bool:
    """Tell whether an answer has a role's label or a marker beside those it would be given."""
    try:
        sign = _RENDERED.find(sft_sides({"prompt": prompt, "completion": answer}))
    except RowError:  # what is wrong with the row is told where it is read
        return False
    return sign is not None and sign.grave


def _texts_without_end(drawn: Sequence[Any], notes: Sequence[Any]) -> set[str]:
    """Return the texts of answers that were cut, wherever they were drawn, and not empty."""
    ended: dict[str, bool] = {}
    for answer, note in zip(drawn, notes, strict=False):
        if isinstance(note, Mapping) and (text := str(answer).strip()):
            ended[text] = ended.get(text, False) or bool(note.get("ended", True))
    return {text for text, has_end in ended.items() if not has_end}
