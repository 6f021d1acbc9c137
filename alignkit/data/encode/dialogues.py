"""Encode dialogues as examples: apply policies, tokenize, and drop whole turns if too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.chunks import chunks, one_ahead
from alignkit.data.encode.code import code_identity
from alignkit.data.encode.columns import named_row
from alignkit.data.encode.draft import DraftExample, rendered_defects
from alignkit.data.encode.draft_tokens import DraftTokenizer
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.encode.workers import Encoded, Workers
from alignkit.data.encode.writer import ExampleWriter
from alignkit.data.read.rows import BadRow, Row, Rows, Source
from alignkit.data.text.defects import Dropped, Judge, beyond_text
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.formats import Format
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.raw import reader
from alignkit.data.text.recognise import check_columns, columns_of
from alignkit.data.text.shapes import Side, Sides, columns_read, last_trained
from alignkit.data.text.templated import Templated
from alignkit.data.text.thoughts import unread_names
from alignkit.engine import Example
from alignkit.errors import AlignkitError
from alignkit.models.text_format import PromptFormat, TextFormat

_CHUNK = 256


class DialogueEncoder:
    """Encode dialogue rows, each as one `Example` whose responses share one prompt.

    Args:
        tokenizer: A fast tokenizer.
        sides: Reads a row: `preference_sides`, `sft_sides` or `unpaired_sides`.
        max_length: Most tokens of a prompt and one response together, EOS included.
        prompt_format: See `alignkit.data.text.formats`.
        all_turns: Score every turn of the assistant instead of the last alone.
        policies: What to do about defects.
        columns: The rows' columns by the names that are read, where they have others.

    Attributes:
        prompt_format: As given.
        reads: What the format has a place for beside text, see `Format`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sides: Sides,
        *,
        max_length: int,
        prompt_format: PromptFormat = "boundary",
        all_turns: bool = False,
        policies: Policies | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        policies = policies or Policies()
        if policies.boundary == "auto":
            policies = replace(
                policies, boundary="keep" if prompt_format == "stripped" else "error"
            )
        if max_length < 2:
            raise AlignkitError(f"max_length={max_length}: give at least 2")
        self.policies = policies
        self.prompt_format = prompt_format
        self.max_length = max_length
        self.masked = all_turns
        self._encode_texts = TextEncoder(tokenizer)
        self._format = Format(prompt_format, tokenizer, all_turns=all_turns)
        self._tokenizer = tokenizer
        self.reads = self._format.reads
        self._columns = columns_read(sides)
        self._names = check_columns(columns)
        self._sides = reader(sides) if prompt_format == "raw" else sides
        self._ids = DraftTokenizer(self._encode_texts, self._format, masked=all_turns)

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything beside the rows that decides the examples."""
        return {
            "tokens": self._encode_texts.fingerprint,
            "format": self._format.identity,
            "sides": code_identity(self._sides),
            "max_length": self.max_length,
            "policies": vars(self.policies),
            "columns": self._names,
        }

    @cached_property
    def _templated(self) -> Templated | None:
        """Return what finds text that was rendered before; a set that is kept needs none."""
        if self.prompt_format == "raw":
            return None
        return Templated(self._tokenizer, specials=self._format.specials)

    def write(
        self, source: Source, writer: ExampleWriter, workers: Workers | None = None
    ) -> dict[str, Any]:
        """Encode a source into a store.

        Args:
            source: The rows.
            writer: Takes the examples.
            workers: Encode in these processes instead of here.

        Returns:
            The counts of its rows and their defects, as `Tally.to_dict`, with ``systems``, the
            system messages (an empty one for none; two at most), and ``ends``, the ids that end
            its answers.

        Raises:
            AlignkitError: A defect whose policy is ``error``; for the boundary proof, after all
                violations have been counted.
        """
        judge = Judge(source.name, self.policies, tally := Tally())
        shown = ""
        systems: set[str] = set()
        ends: set[int] = set()
        for each in (workers or self).encoded(source.rows(), judge):
            if judge.is_repeated(each.key, each.line):
                continue
            tally.add("examples", each.line)
            systems.add(each.system)
            ends.update(response[-1] for response in each.example.responses)
            shown = shown or each.violation
            writer.add(each.example, each.line)
        violations = tally.counts.get("boundary", 0)
        if violations and self.policies.boundary == "error":
            raise AlignkitError(
                f"{source.name}:{tally.lines['boundary'][0]}: prompt and answer have other ids "
                f"together than apart in {violations} of {writer.examples} examples ({shown}); "
                "mend the rows, or set data.policies.boundary to drop or keep"
            )
        return {**tally.to_dict(), "systems": sorted(systems)[:2], "ends": sorted(ends)}

    def text_format(self, systems: Sequence[str], ends: Sequence[int]) -> TextFormat:
        """Return what generation must know of the examples; see `TextFormat`."""
        return TextFormat(
            self._format.name,
            self.max_length,
            chat_template=self._format.chat_template,
            system=(systems[0] or None) if len(systems) == 1 else None,
            turns="all" if self.masked else "last",
            ends=tuple(ends),
        )

    def drafts(self, source: Source, tally: Tally) -> Iterator[DraftExample]:
        """Yield the source's finished drafts, in order; ``tally`` counts rows and defects."""
        judge = Judge(source.name, self.policies, tally)
        for draft in self._finished(source.rows(), judge):
            if not judge.is_repeated(judge.key(draft.dialogue.prompt), draft.line):
                tally.add("examples", draft.line)
                yield draft

    def encoded(self, rows: Rows, judge: Judge) -> Iterator[Encoded]:
        """Yield the examples of some rows; see `ChunkEncoder`."""
        for draft in self._finished(rows, judge):
            violation = draft.violation
            yield Encoded(
                draft.line,
                self.example(draft),
                judge.key(draft.dialogue.prompt),
                self._format.system(draft.dialogue),
                "" if violation is None else f"{draft.text.prompt[-20:]!r} + {violation[:20]!r}",
            )

    def _finished(self, rows: Rows, judge: Judge) -> Iterator[DraftExample]:
        for drafts in one_ahead(self._tokenize, chunks(self._settled(rows, judge), _CHUNK)):
            for draft in drafts:
                try:
                    self._finish(draft, judge)
                except Dropped:
                    continue
                yield draft

    def _tokenize(self, drafts: Sequence[DraftExample]) -> None:
        """Run all that needs the tokenizer, which two threads may not use at once."""
        self.encode(drafts)
        self._drop_turns(drafts)

    def example(self, draft: DraftExample) -> Example:
        """Return a finished draft as the example that the engine takes."""
        scored = draft.scored if self.masked else None
        return Example(draft.prompt, draft.responses, scored, draft.label)

    def _settled(self, rows: Rows, judge: Judge) -> Iterator[DraftExample]:
        for line, row in rows:
            judge.tally.add("rows", line)
            try:
                row = named_row(row, self._names)
                sides: Sequence[Side] = read_row(row, self._sides, judge, line)
                judge.tally.read_as(sides[0].shape if sides else "")
                if self._columns is not None and not isinstance(row, BadRow):
                    judge.tally.columns |= row.keys() - self._columns - columns_of(sides[0].shape)
                if self.masked:
                    sides = [last_trained(side) for side in sides]
                if self._templated is not None:
                    sides = self._templated.settle(sides, judge, line)
                if lost := beyond_text(sides) - self.reads:
                    if self.prompt_format == "chat" and "tools" in lost:
                        judge.count("unwritten_tools", line)
                        lost -= {"tools"}
                    judge.unread(unread_names(lost, self.reads), line)
                yield DraftExample(line, judge.settle(sides, line), label=sides[0].label)
            except Dropped:
                continue

    def encode(self, drafts: Sequence[DraftExample], starts: Sequence[int] | None = None) -> None:
        """Compute the ids of drafts; see `DraftTokenizer`."""
        self._ids.fill(drafts, starts)

    def _drop_turns(self, drafts: Sequence[DraftExample]) -> None:
        """Remove old turns, whole, from the dialogues that are too long.

        A dialogue restarts at a later turn of the human, as every published one starts with one;
        what is left is encoded again, so its ids are those of its text.
        """
        pending = [each for each in drafts if not each.refusal and self._too_long(each)]
        for draft in pending:
            draft.truncated = True
            draft.restarts = self._format.restarts(draft.dialogue)
        while restarting := [each for each in pending if each.restarts and self._too_long(each)]:
            self.encode(restarting, [draft.restarts.pop(0) for draft in restarting])
        for draft in pending:
            if self._format.keeps_start and self._too_long(draft):
                place = self._format.question(draft.dialogue, draft.start, draft.text)
                draft.movable = self._ids.tokens_of(draft.text.prompt, *place)

    def _too_long(self, draft: DraftExample) -> bool:
        return not draft.refusal and draft.length > self.max_length

    def _finish(self, draft: DraftExample, judge: Judge) -> None:
        """Apply the policies that need ids, and cut a prompt that is still too long on its left."""
        if draft.refusal:
            judge.refuse("bad_rows", draft.line, draft.refusal)
        for name in rendered_defects(draft):
            judge.count(name, draft.line)
        start, end = draft.movable
        excess = draft.length - self.max_length
        if excess > end - start:
            around = len(draft.prompt) - (end - start)
            what = f" and the {around} tokens of its prompt that must stay" if around else ""
            detail = f"an answer of {draft.answer_length} tokens{what} exceeds max_length"
            judge.count("too_long", draft.line, f"{detail}={self.max_length}")
        if draft.violation is not None:
            if self.policies.boundary == "error":
                judge.tally.add("boundary", draft.line)  # the run fails once all are counted
            else:
                judge.count("boundary", draft.line)
        if draft.truncated:
            judge.tally.add("truncated", draft.line)
        if excess > 0:
            draft.prompt = draft.prompt[:start] + draft.prompt[start + excess :]


def read_row(
    row: Row,
    sides: Sides,
    judge: Judge,
    line: int,
) -> list[Side]:
    """Read the sides of a row, and apply the policy for a bad row.

    Raises:
        AlignkitError: The row is bad and its policy is ``error``.
        Dropped: The row is bad and its policy is ``drop``.
    """
    reason = row.reason if isinstance(row, BadRow) else ""
    if not isinstance(row, BadRow):
        try:
            return sides(row)
        except RowError as error:
            reason = str(error)
    judge.refuse("bad_rows", line, reason)
