"""Audit the rows of dialogues and of documents: their defects and lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample, rendered_defects
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.read.rows import BadRow, Row, Source
from alignkit.data.text.defects import (
    Dropped,
    Judge,
    beyond_text,
    character_defects,
    defects,
    prompt_key,
    readable,
)
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import unread_columns
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.raw import reader
from alignkit.data.text.recognise import (
    TEXT_COLUMNS,
    columns_of,
    document_of,
)
from alignkit.data.text.shapes import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Side,
    Sides,
    preference_sides,
    sft_sides,
)
from alignkit.data.text.templated import Templated
from alignkit.data.text.thoughts import unread_names
from alignkit.models.text_format import SPECIALS, PromptFormat
from alignkit.tools.audit.findings import Findings

_SNIPPET = 200
# Rows are settled only to measure them, so no policy drops any.
_LENIENT = Policies(
    unread_fields="keep",
    differing_prompts="keep",
    roles_inside_answer="keep",
    empty_answers="keep",
    identical_pairs="keep",
    templated_text="keep",
    boundary="keep",
)

Numbered = tuple[int, Row]
Read = TypeVar("Read")


class _Scanner:
    """Audit the rows of a source and add what was found to the report.

    Args:
        found: The report so far.
        examples: How many examples of a defect are kept.
    """

    def __init__(self, found: Findings, examples: int) -> None:
        self._found = found
        self._limit = examples
        self._seen: set[bytes] = set()

    def _readable(
        self, rows: Sequence[Numbered], read: Callable[[Mapping[str, Any]], Read]
    ) -> Iterator[tuple[int, Mapping[str, Any], Read]]:
        """Yield number, row and what is read of it; count a row that cannot be read as bad."""
        for number, row in rows:
            if isinstance(row, BadRow):
                continue
            try:
                value = read(row)
            except RowError as error:
                self._found.add("bad_rows", number, str(error), self._limit)
                continue
            yield number, row, value


class DialogueScanner(_Scanner):
    """Audit rows of dialogues, for preference training or SFT."""

    def __init__(
        self, found: Findings, tokenizer: PreTrainedTokenizerBase | None, examples: int
    ) -> None:
        super().__init__(found, examples)
        preference = found.settings["kind"] == "preference"
        self._sides: Sides = preference_sides if preference else sft_sides
        self._columns = PREFERENCE_COLUMNS if preference else SFT_COLUMNS
        # Without a tokenizer, ``auto`` stays open: nobody knows what has a place for tools.
        self._open = found.settings["prompt_format"] == "auto"
        settled: PromptFormat = found.settings["prompt_format"]
        prompt_format = "boundary" if self._open else settled
        self._templated: Templated | None = None
        if prompt_format == "raw":
            self._sides = reader(self._sides)
        else:
            self._templated = Templated(tokenizer, specials=prompt_format in SPECIALS)
        self._encoder = tokenizer and DialogueEncoder(
            tokenizer,
            self._sides,
            max_length=found.settings["max_length"],
            prompt_format=prompt_format,
        )

    def take(self, source: Source, rows: Sequence[Numbered]) -> None:
        """Audit some rows of a source."""
        judge = Judge(source.name, _LENIENT, Tally())
        drafts = []
        for number, row, sides in self._readable(rows, self._sides):
            shape = sides[0].shape
            self._found.tally.read_as(shape)
            self._found.tally.columns |= row.keys() - self._columns - columns_of(shape)
            sides = self._judge_fields(sides, number)
            self._judge(sides, number)
            if self._templated is not None:
                sides = list(self._templated.settle(sides, judge, number))
            try:
                drafts.append(DraftExample(number, judge.settle(sides, number)))
            except Dropped:
                continue
        if self._encoder:
            self._encoder.encode(drafts)
        for draft in drafts:
            if draft.refusal:
                self._found.add("bad_rows", draft.line, draft.refusal, self._limit)
            else:
                self._measure(draft)

    def _judge_fields(self, sides: list[Side], number: int) -> list[Side]:
        """Return a row's sides with what the format has no place for among the unread."""
        if self._open:
            return sides
        reads = self._encoder.reads if self._encoder else frozenset()
        lost = beyond_text(sides) - reads
        if self._encoder and self._encoder.prompt_format == "chat" and "tools" in lost:
            text = _snippet("unwritten_tools", sides)
            self._found.add("unwritten_tools", number, text, self._limit)
            lost -= {"tools"}
        if not lost:
            return sides
        unread = tuple(unread_names(lost, reads))
        return [side._replace(unread=(*side.unread, *unread)) for side in sides]

    def _judge(self, sides: Sequence[Side], number: int) -> None:
        names = defects(sides)
        key = prompt_key(sides[0].prompt)
        if key in self._seen:
            names.append("repeated_prompts")
        self._seen.add(key)
        for name in names:
            self._found.add(name, number, _snippet(name, sides), self._limit)
        if self._templated is not None and (sign := self._templated.find(sides)):
            text = f"{sign.told}: {_snippet('templated_text', sides)}"
            self._found.add("templated_text", number, text, self._limit)

    def _measure(self, draft: DraftExample) -> None:
        dialogue = draft.dialogue
        if self._encoder:
            prompt = len(draft.prompt)
            answers = [len(response) for response in draft.responses]
        else:
            prompt = estimated_tokens(dialogue.prompt)
            answers = [estimated_tokens(answer) + 1 for answer in dialogue.answers]
        longest = prompt + max(answers)
        others = answers[1:]
        bias = {"rejected": round(sum(others) / len(others))} if others else {}
        self._found.measure(prompt=prompt, chosen=answers[0], **bias, longest=longest)
        self._found.tokens_apart += sum(prompt + answer for answer in answers)
        self._found.tokens_shared += prompt + sum(answers)
        limit = self._found.settings["max_length"]
        end = dialogue.prompt[-_SNIPPET:]
        for name in rendered_defects(draft) if self._encoder else ():
            shown = "\n— and —\n".join(answer[:_SNIPPET] for answer in dialogue.answers)
            self._found.add(name, draft.line, shown, self._limit)
        if longest > limit:
            self._found.add("truncated", draft.line, f"{longest}: …{end}", self._limit)
        if max(answers) > limit:
            self._found.add("too_long", draft.line, f"{max(answers)}: …{end}", self._limit)
        if draft.violation is not None:
            shown = f"{draft.text.prompt[-40:]!r} + {draft.violation[:40]!r}"
            self._found.add("boundary", draft.line, shown, self._limit)


class TextScanner(_Scanner):
    """Audit rows of plain text, in which a repeated prompt is a repeated document."""

    def __init__(
        self, found: Findings, tokenizer: PreTrainedTokenizerBase | None, examples: int
    ) -> None:
        super().__init__(found, examples)
        self._encode = tokenizer and TextEncoder(tokenizer)
        self._templated = Templated(tokenizer)

    def take(self, source: Source, rows: Sequence[Numbered]) -> None:
        """Audit some rows of a source."""
        texts = []
        for number, row, text in self._readable(rows, document_of):
            self._found.tally.columns |= row.keys() - set(TEXT_COLUMNS)
            if unread := unread_columns(row, TEXT_COLUMNS, None):
                self._found.add("unread_fields", number, ", ".join(unread), self._limit)
            if self._judge(text, number):
                texts.append((number, readable(text)))
        if self._encode:
            encoded = self._encode.prompts([text for _, text in texts], "text")
            lengths = [len(ids) + 1 for ids in encoded]
        else:
            lengths = [estimated_tokens(text) + 1 for _, text in texts]
        for (number, text), length in zip(texts, lengths, strict=True):
            self._found.measure(document=length)
            if length > self._found.settings["max_length"]:
                snippet = f"{length}: {text[:_SNIPPET]}…"
                self._found.add("truncated", number, snippet, self._limit)

    def _judge(self, text: str, number: int) -> bool:
        """Count a document's defects, and tell whether it holds any text."""
        key = prompt_key(text)
        names = character_defects(text)
        names += ["empty_answers"] if not text.strip() else []
        names += ["repeated_prompts"] if key in self._seen else []
        self._seen.add(key)
        for name in names:
            self._found.add(name, number, text[:_SNIPPET], self._limit)
        if sign := self._templated.find_in_document(text):
            shown = f"{sign.told}: {text[:_SNIPPET]}"
            self._found.add("templated_text", number, shown, self._limit)
        return bool(text.strip())


def estimated_tokens(text: str) -> int:
    """Return a token for every four bytes, which is about right for English under a BPE."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


def _snippet(name: str, sides: Sequence[Side]) -> str:
    """Return the part of a row that shows a defect."""
    if name == "unread_fields":
        return ", ".join(dict.fromkeys(field for side in sides for field in side.unread))
    if name in ("differing_prompts", "doubled_roles", "repeated_prompts"):
        prompts = dict.fromkeys(f"…{side.prompt[-_SNIPPET:]}" for side in sides)
        return "\n— and —\n".join(prompts)
    return "\n— and —\n".join(
        f"…{side.prompt[-_SNIPPET // 2 :]}⟨answer⟩{side.answer[:_SNIPPET]}" for side in sides
    )
