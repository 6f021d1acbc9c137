"""Reading a set once for its audit: defects, places, examples and lengths."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.defects import (
    MEANING,
    Dropped,
    Judge,
    Policies,
    Tally,
    character_defects,
    defects,
    prompt_key,
    readable,
)
from alignkit.data.dialogue import RowError
from alignkit.data.encode import DialogueEncoder, Draft, chunks
from alignkit.data.files import BadRow, Row, Source
from alignkit.data.formats import PromptFormat
from alignkit.data.shapes import Side, preference_sides, sft_sides
from alignkit.data.sources import find_splits
from alignkit.data.tokens import TextEncoder
from alignkit.errors import AlignkitError
from alignkit.models import load_tokenizer

Kind = Literal["auto", "preference", "sft", "text"]

_CHUNK = 256
_SNIPPET = 200
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# Rows are settled only to measure them, so nothing goes that need not.
_LENIENT = Policies(
    differing_prompts="keep",
    roles_inside_answer="keep",
    empty_answers="keep",
    identical_pairs="keep",
    boundary="keep",
)


@dataclass
class Scan:
    """What an audit found.

    Attributes:
        settings: What was asked: path, kind, tokenizer, unit, max_length, prompt_format.
        tally: Rows by defect, and their numbers; a second source's go on from the first one's.
        sources: Name, first row number and rows of each source.
        examples: A few examples of each defect: row number and text.
        lengths: Lengths of every prompt, of every chosen and rejected answer with its EOS, and
            of the longest prompt + answer of each row; of every document, for text.
        apart: Tokens with every answer beside a prompt of its own.
        shared: Tokens with each prompt once.
    """

    settings: dict[str, Any]
    tally: Tally = field(default_factory=lambda: Tally(lines_kept=None))
    sources: list[dict[str, Any]] = field(default_factory=list)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lengths: dict[str, array[int]] = field(default_factory=dict)
    apart: int = 0
    shared: int = 0

    def add(self, defect: str, row: int, text: str, limit: int) -> None:
        """Count a defect, and keep its text while there are fewer than ``limit`` examples."""
        self.tally.add(defect, row)
        kept = self.examples.setdefault(defect, [])
        if len(kept) < limit:
            kept.append({"row": row, "text": readable(text)})

    def measure(self, **lengths: int) -> None:
        """Note lengths by name."""
        for name, length in lengths.items():
            self.lengths.setdefault(name, array("q")).append(length)

    def to_dict(self) -> dict[str, Any]:
        """The report; see `alignkit.data.audit.audit`."""
        counts = {name: self.tally.counts.get(name, 0) for name in ["rows", *MEANING]}
        if self.settings["tokenizer"] is None:
            del counts["boundary"]  # it cannot be proved without
        report: dict[str, Any] = {
            **self.settings,
            **counts,
            "row_numbers": {
                name: sorted(self.tally.lines.get(name, [])) for name in counts if name != "rows"
            },
            "sources": self.sources,
            "examples": self.examples,
            "lengths": {name: _summary(values) for name, values in self.lengths.items()},
            "repeated_prompt_share": counts["repeated_prompts"] / max(1, counts["rows"]),
        }
        if self.settings["kind"] == "preference" and self.lengths:
            chosen, rejected = (np.array(self.lengths[side]) for side in ("chosen", "rejected"))
            report["length_bias"] = {
                "chosen_mean": float(chosen.mean()),
                "rejected_mean": float(rejected.mean()),
                "chosen_longer_share": float((chosen > rejected).mean()),
                "equal_share": float((chosen == rejected).mean()),
            }
            report["prompt_sharing"] = {
                "tokens_apart": self.apart,
                "tokens_shared": self.shared,
                "saved_share": 1 - self.shared / self.apart,
            }
        return report


def scan(
    path: str,
    *,
    kind: Kind,
    split: str | None,
    tokenizer: str | None,
    max_length: int,
    prompt_format: PromptFormat,
    examples: int,
) -> Scan:
    """Read every row of a set once; arguments as `alignkit.data.audit.audit` takes them.

    Raises:
        AlignkitError: Nothing can be read there, or there is no such split.
    """
    splits = find_splits(path)
    if split is not None and split not in splits:
        raise AlignkitError(f"--split {split}: {path} has {', '.join(splits)}")
    sources = [source for name in splits if split in (None, name) for source in splits[name]]
    found = Scan(
        {
            "path": path,
            "kind": _kind(sources[0]) if kind == "auto" else kind,
            "tokenizer": tokenizer,
            "unit": "tokens" if tokenizer else "estimated tokens",
            "max_length": max_length,
            "prompt_format": prompt_format,
        }
    )
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    scanner = (_Text if found.settings["kind"] == "text" else _Dialogues)(found, loaded, examples)
    first = 1
    for source in sources:
        rows = last = 0
        for chunk in chunks(_counted(source, found, first, examples), _CHUNK):
            scanner.take(source, chunk)
            rows, last = rows + len(chunk), chunk[-1][0]
        found.sources.append({"name": source.name, "first_row": first, "rows": rows})
        first = max(first, last + 1)
    return found


Numbered = tuple[int, Row]


def _counted(source: Source, found: Scan, first: int, limit: int) -> Iterator[Numbered]:
    """The source's rows, numbered on, the unreadable ones counted."""
    for line, row in source.rows():
        number = first + line - 1
        found.tally.add("rows", number)
        if isinstance(row, BadRow):
            found.add("bad_rows", number, row.reason, limit)
        yield number, row


def _kind(source: Source) -> str:
    """What a source holds, by its first readable row."""
    readable_rows = (row for _, row in source.rows() if not isinstance(row, BadRow))
    for row in islice(readable_rows, 1):
        if "rejected" in row or "responses" in row:
            return "preference"
        if "text" in row:
            return "text"
    return "sft"


class _Dialogues:
    """Audits dialogue rows, for preference training or SFT."""

    def __init__(
        self, found: Scan, tokenizer: PreTrainedTokenizerBase | None, examples: int
    ) -> None:
        self._found = found
        self._limit = examples
        self._seen: set[bytes] = set()
        self._sides: Callable[[Mapping[str, Any]], list[Side]] = (
            preference_sides if found.settings["kind"] == "preference" else sft_sides
        )
        self._encoder = tokenizer and DialogueEncoder(
            tokenizer,
            self._sides,
            max_length=found.settings["max_length"],
            prompt_format=found.settings["prompt_format"],
        )

    def take(self, source: Source, rows: Sequence[Numbered]) -> None:
        """Audit some rows of a source."""
        judge = Judge(source.name, _LENIENT, Tally())
        drafts = []
        for number, row in rows:
            if isinstance(row, BadRow):
                continue
            try:
                sides = self._sides(row)
            except RowError as error:
                self._found.add("bad_rows", number, str(error), self._limit)
                continue
            self._judge(sides, number)
            try:
                drafts.append(Draft(number, judge.settle(sides, number)))
            except Dropped:
                continue
        if self._encoder:
            self._encoder.encode(drafts)
            self._encoder.prove(drafts)
        for draft in drafts:
            self._measure(draft)

    def _judge(self, sides: Sequence[Side], number: int) -> None:
        names = defects(sides)
        key = prompt_key(sides[0].prompt)
        if key in self._seen:
            names.append("repeated_prompts")
        self._seen.add(key)
        for name in names:
            self._found.add(name, number, _snippet(name, sides), self._limit)

    def _measure(self, draft: Draft) -> None:
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
        self._found.apart += sum(prompt + answer for answer in answers)
        self._found.shared += prompt + sum(answers)
        limit = self._found.settings["max_length"]
        end = dialogue.prompt[-_SNIPPET:]
        if longest > limit:
            self._found.add("truncated", draft.line, f"{longest}: …{end}", self._limit)
        if max(answers) > limit:
            self._found.add("too_long", draft.line, f"{max(answers)}: …{end}", self._limit)
        if draft.violation is not None:
            shown = f"{draft.text.prompt[-40:]!r} + {draft.violation[:40]!r}"
            self._found.add("boundary", draft.line, shown, self._limit)


class _Text:
    """Audits rows of plain text; a repeated prompt is a repeated document."""

    def __init__(
        self, found: Scan, tokenizer: PreTrainedTokenizerBase | None, examples: int
    ) -> None:
        self._found = found
        self._limit = examples
        self._seen: set[bytes] = set()
        self._encode = tokenizer and TextEncoder(tokenizer)

    def take(self, source: Source, rows: Sequence[Numbered]) -> None:
        """Audit some rows of a source."""
        texts = []
        for number, row in rows:
            if isinstance(row, BadRow):
                continue
            text = row.get("text")
            if not isinstance(text, str):
                self._found.add("bad_rows", number, "the row has no `text`", self._limit)
                continue
            if self._judge(text, number):
                texts.append((number, readable(text)))
        if self._encode:
            lengths = [len(ids) + 1 for ids in self._encode([text for _, text in texts])]
        else:
            lengths = [estimated_tokens(text) + 1 for _, text in texts]
        for (number, text), length in zip(texts, lengths, strict=True):
            self._found.measure(document=length)
            if length > self._found.settings["max_length"]:
                snippet = f"{length}: {text[:_SNIPPET]}…"
                self._found.add("truncated", number, snippet, self._limit)

    def _judge(self, text: str, number: int) -> bool:
        """Count a document's defects; whether it holds anything."""
        key = prompt_key(text)
        names = character_defects(text)
        names += ["empty_answers"] if not text.strip() else []
        names += ["repeated_prompts"] if key in self._seen else []
        self._seen.add(key)
        for name in names:
            self._found.add(name, number, text[:_SNIPPET], self._limit)
        return bool(text.strip())


def estimated_tokens(text: str) -> int:
    """A token for every four bytes, about right for English under a BPE."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


def _snippet(name: str, sides: Sequence[Side]) -> str:
    """The part of a row that shows a defect."""
    if name in ("differing_prompts", "doubled_roles", "repeated_prompts"):
        prompts = dict.fromkeys(f"…{side.prompt[-_SNIPPET:]}" for side in sides)
        return "\n— and —\n".join(prompts)
    return "\n— and —\n".join(
        f"…{side.prompt[-_SNIPPET // 2 :]}⟨answer⟩{side.answer[:_SNIPPET]}" for side in sides
    )


def _summary(values: array[int]) -> dict[str, float]:
    numbers = np.array(values)
    percentiles = np.percentile(numbers, _PERCENTILES)
    summary = {f"p{at}": float(value) for at, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(numbers.mean()), **summary, "max": float(numbers.max())}
