"""Dialogues to examples: encoding, the boundary proof, and truncation that knows turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data.chunks import chunks, one_ahead
from alignkit.data.code import code_identity
from alignkit.data.defects import Dropped, Judge
from alignkit.data.dialogue import ASSISTANT, RowError
from alignkit.data.draft import Draft, rendered_defects
from alignkit.data.files import BadRow, Row, Source
from alignkit.data.formats import Format, PromptFormat
from alignkit.data.policies import Policies, Tally
from alignkit.data.shapes import Side, Sides, columns_read, last_trained
from alignkit.data.store import StoreWriter
from alignkit.data.tokens import TextEncoder
from alignkit.engine import Example
from alignkit.errors import AlignkitError

_CHUNK = 256


class DialogueEncoder:
    """Encodes dialogue rows, each as one `Example` whose responses share one prompt.

    Args:
        tokenizer: A fast tokenizer.
        sides: Reads a row: `preference_sides` or `sft_sides`.
        max_length: Most tokens of a prompt and one response together, EOS included.
        prompt_format: See `alignkit.data.formats`.
        all_turns: Score every turn of the assistant instead of the last alone.
        policies: What to do about defects.
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
    ) -> None:
        policies = policies or Policies()
        if policies.boundary == "auto":
            policies = replace(policies, boundary="keep" if prompt_format == "seed" else "error")
        if max_length < 2:
            raise AlignkitError(f"max_length={max_length}: give at least 2")
        self.policies = policies
        self.max_length = max_length
        self.masked = all_turns
        self._encode_texts = TextEncoder(tokenizer)
        self._format = Format(prompt_format, tokenizer, all_turns=all_turns)
        self._sides = sides
        self._columns = columns_read(sides)
        self._simple = prompt_format == "boundary" and not all_turns

    @property
    def identity(self) -> dict[str, Any]:
        """Everything beside the rows that decides the examples."""
        return {
            "tokens": self._encode_texts.fingerprint,
            "format": self._format.identity,
            "sides": code_identity(self._sides),
            "max_length": self.max_length,
            "policies": vars(self.policies),
        }

    @cached_property
    def _lead(self) -> str:
        """What precedes every answer, where it is enough of the prompt for the boundary proof."""
        apart = self._simple and self._encode_texts.reads_words_apart
        return f"\n\n{ASSISTANT}" if apart else ""

    def write(self, source: Source, writer: StoreWriter) -> dict[str, Any]:
        """Encode a source into a store.

        Returns:
            The counts of its rows and their defects, as `Tally.to_dict`.

        Raises:
            AlignkitError: A defect whose policy is ``error``; for the boundary proof, after all
                violations have been counted.
        """
        tally = Tally()
        shown = ""
        for draft in self.drafts(source, tally):
            if draft.violation is not None:
                shown = shown or f"{draft.text.prompt[-20:]!r} + {draft.violation[:20]!r}"
            writer.add(self.example(draft), draft.line)
        violations = tally.counts.get("boundary", 0)
        if violations and self.policies.boundary == "error":
            raise AlignkitError(
                f"{source.name}:{tally.lines['boundary'][0]}: prompt and answer have other ids "
                f"together than apart in {violations} of {writer.examples} examples ({shown}); "
                "mend the rows, or set data.policies.boundary to drop or keep"
            )
        return tally.to_dict()

    def drafts(self, source: Source, tally: Tally) -> Iterator[Draft]:
        """The source's finished examples, in order; ``tally`` counts rows and defects."""
        judge = Judge(source.name, self.policies, tally)
        for drafts in one_ahead(self._tokenize, chunks(self._settled(source, judge), _CHUNK)):
            for draft in drafts:
                try:
                    self._finish(draft, judge)
                except Dropped:
                    continue
                yield draft

    def _tokenize(self, drafts: Sequence[Draft]) -> None:
        """All that needs the tokenizer, which two threads may not use at once."""
        self.encode(drafts)
        self._drop_turns(drafts)
        self.prove(drafts)

    def example(self, draft: Draft) -> Example:
        """A finished draft as the engine takes it."""
        return Example(draft.prompt, draft.responses, draft.scored if self.masked else None)

    def _settled(self, source: Source, judge: Judge) -> Iterator[Draft]:
        for line, row in source.rows():
            judge.tally.add("rows", line)
            try:
                sides = read_row(row, self._sides, judge, line)
                if self._columns is not None and not isinstance(row, BadRow):
                    judge.tally.columns |= row.keys() - self._columns
                if self.masked:
                    sides = [last_trained(side) for side in sides]
                yield Draft(line, judge.settle(sides, line))
            except Dropped:
                continue

    def encode(self, drafts: Sequence[Draft], starts: Sequence[int] | None = None) -> None:
        """Fill in the ids: each prompt once, whatever the number of its responses.

        Args:
            drafts: What to encode, from their dialogues.
            starts: The turn that each prompt starts from; default: the first.
        """
        for draft, start in zip(drafts, starts or [0] * len(drafts), strict=True):
            draft.text = self._format.render(draft.dialogue, start)
            draft.proved = False
        if self._lead:
            self._encode_led([d for d in drafts if d.text.prompt.endswith(self._lead)])
        self._encode_plain([draft for draft in drafts if not draft.proved])

    def _encode_led(self, drafts: Sequence[Draft]) -> None:
        """Encode each answer behind its label, which proves the boundary at little cost.

        Where the prompt's ids end with the label's and the led answer's begin with them, the
        two meet in the same text and the same tokens, so nothing changes when they are joined
        (see `TextEncoder.reads_words_apart`). Other drafts stay unproved.
        """
        texts = [self._lead]
        for draft in drafts:
            texts.append(draft.text.prompt)
            texts += [self._lead + answer for (answer,) in draft.text.responses]
        lead, *encoded = self._encode_texts(texts)
        ids, size = iter(encoded), len(lead)
        for draft in drafts:
            prompt = next(ids)
            answers = [next(ids) for _ in draft.text.responses]
            draft.proved = all(part[:size] == lead for part in (prompt[-size:], *answers))
            draft.prompt = [*self._encode_texts.bos, *prompt]
            draft.responses = [[*answer[size:], self._encode_texts.eos] for answer in answers]
            draft.blank = any(len(answer) == size for answer in answers)

    def _encode_plain(self, drafts: Sequence[Draft]) -> None:
        texts = [piece for draft in drafts for piece in draft.text.pieces()]
        ids = iter(self._encode_texts(texts, specials=self._format.specials))
        for draft in drafts:
            draft.prompt = [*self._encode_texts.bos, *next(ids)]
            draft.responses, draft.scored, draft.blank = [], [], draft.text.blank
            for response in draft.text.responses:
                pieces = [next(ids) for _ in response]
                draft.blank |= not pieces[-1]
                pieces[-1].append(self._encode_texts.eos)
                draft.responses.append([token for piece in pieces for token in piece])
                if self.masked:
                    flags = [[i % 2 == 0] * len(piece) for i, piece in enumerate(pieces)]
                    draft.scored.append([flag for piece in flags for flag in piece])

    def _drop_turns(self, drafts: Sequence[Draft]) -> None:
        """Drop old turns, whole, from the dialogues that are too long.

        A dialogue restarts at a later turn of the human, as every published one starts with one;
        what is left is encoded again, so its ids are those of its text.
        """
        pending = [draft for draft in drafts if draft.length > self.max_length]
        for draft in pending:
            draft.truncated = True
            draft.restarts = self._format.restarts(draft.dialogue)
        while pending := [each for each in pending if each.restarts and self._too_long(each)]:
            self.encode(pending, [draft.restarts.pop(0) for draft in pending])

    def _too_long(self, draft: Draft) -> bool:
        return draft.length > self.max_length

    def prove(self, drafts: Sequence[Draft]) -> None:
        """The boundary proof: encode prompt and response together and compare the ids."""
        drafts = [draft for draft in drafts if not draft.proved]
        whole = [
            draft.text.prompt + "".join(response)
            for draft in drafts
            for response in draft.text.responses
        ]
        together = iter(self._encode_texts(whole, specials=self._format.specials))
        bos = len(self._encode_texts.bos)
        for draft in drafts:
            for response, ids in zip(draft.text.responses, draft.responses, strict=True):
                if next(together) != draft.prompt[bos:] + ids[:-1]:
                    draft.violation = draft.violation or "".join(response)

    def _finish(self, draft: Draft, judge: Judge) -> None:
        """Apply the policies that need ids, and cut the left of a last prompt that is too long."""
        for name in rendered_defects(draft):
            judge.count(name, draft.line)
        if draft.answer_length > self.max_length:
            detail = f"an answer of {draft.answer_length} tokens exceeds max_length"
            judge.count("too_long", draft.line, f"{detail}={self.max_length}")
        if draft.violation is not None:
            if self.policies.boundary == "error":
                judge.tally.add("boundary", draft.line)  # the run fails once all are counted
            else:
                judge.count("boundary", draft.line)
        if draft.truncated:
            judge.tally.add("truncated", draft.line)
        excess = draft.length - self.max_length
        if excess > 0:
            bos = len(self._encode_texts.bos)
            kept = draft.prompt[bos + excess :]
            draft.prompt = ([*self._encode_texts.bos, *kept]) if kept else []
        judge.tally.add("examples", draft.line)


def read_row(
    row: Row,
    sides: Sides,
    judge: Judge,
    line: int,
) -> list[Side]:
    """The sides of a row.

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
