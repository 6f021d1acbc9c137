"""Encode documents as rows of tokens, for language modelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.batch import Example
from alignkit.data.encode.chunks import chunks
from alignkit.data.encode.columns import named_row
from alignkit.data.encode.packing import Document, Packing, rows
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.encode.workers import Encoded, Workers
from alignkit.data.encode.writer import ExampleWriter
from alignkit.data.read.rows import BadRow, Row, Rows, Source
from alignkit.data.text.defects import Dropped, Judge, character_defects, readable
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import unread_columns
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.recognise import TEXT_COLUMNS, check_columns, document_of
from alignkit.data.text.templated import Templated
from alignkit.models.text_format import TextFormat

_CHUNK = 64


class DocumentEncoder:
    """Encode ``{"text": …}`` rows as rows of ``block_size`` tokens.

    Args:
        tokenizer: A fast tokenizer; what it puts before a text begins every document, and its EOS
            ends it.
        block_size: Tokens of a row.
        packing: See `alignkit.data.encode.packing.rows`.
        policies: What to do about rows that are bad, empty or hold control characters.
        columns: ``{"text": …}`` where another column holds the documents.
    """

    masked = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        packing: Packing,
        policies: Policies | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.policies = policies or Policies()
        self._encode = TextEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._packing = packing
        self._names = check_columns(columns)
        rows([], block_size, packing)  # refuses what it does not know, before any work

    @cached_property
    def _templated(self) -> Templated:
        """Return what finds text that was rendered before; a set that is kept needs none."""
        return Templated(self._tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything beside the documents that decides the rows."""
        return {
            "tokens": self._encode.fingerprint,
            "block_size": self._block_size,
            "packing": self._packing,
            "policies": vars(self.policies),
            "columns": self._names,
        }

    def write(
        self, source: Source, writer: ExampleWriter, workers: Workers | None = None
    ) -> dict[str, Any]:
        """Encode a source into a store, in the workers if there are any.

        Returns:
            The counts as `Tally.to_dict`, with ``systems`` and ``ends`` as `RowEncoder` has them.
        """
        tally = Tally()
        for line, example in self.examples(source, tally, workers):
            writer.add(example, line)
        return {**tally.to_dict(), "systems": [], "ends": [self._encode.eos]}

    def text_format(self, systems: Sequence[str], ends: Sequence[int]) -> TextFormat:
        """Return what generation must know of the rows; see `TextFormat`."""
        return TextFormat("text", self._block_size, ends=(self._encode.eos,))

    def examples(
        self, source: Source, tally: Tally, workers: Workers | None = None
    ) -> Iterator[tuple[int, Example]]:
        """Yield the source's rows of tokens, each with the line of its first document."""
        documents = self._documents(source, tally, workers)
        for line, example in rows(documents, self._block_size, self._packing):
            tally.add("examples", line)
            yield line, example

    def encoded(self, rows: Rows, judge: Judge) -> Iterator[Encoded]:
        """Yield the documents of some rows, not yet packed; see `ChunkEncoder`."""
        for texts in chunks(self._texts(rows, judge), _CHUNK):
            encoded = self._encode.prompts([text for _, text in texts], "text")
            for (line, text), ids in zip(texts, encoded, strict=True):
                yield Encoded(line, Example([], [[*ids, self._encode.eos]]), judge.key(text))

    def _documents(
        self, source: Source, tally: Tally, workers: Workers | None
    ) -> Iterator[Document]:
        judge = Judge(source.name, self.policies, tally)
        for each in (workers or self).encoded(source.rows(), judge):
            if not judge.is_repeated(each.key, each.line):
                (ids,) = each.example.responses
                yield each.line, list(ids)

    def _texts(self, rows: Rows, judge: Judge) -> Iterator[tuple[int, str]]:
        for line, row in rows:
            judge.tally.add("rows", line)
            row = named_row(row, self._names)
            try:
                text = self._templated.settle_document(_text(row, judge, line), judge, line)
                if not text.strip():
                    judge.refuse("empty_answers", line, "an empty document")
            except Dropped:
                continue
            yield line, text


def _text(row: Row, judge: Judge, line: int) -> str:
    """Return a row's text.

    Raises:
        AlignkitError: The row has a defect whose policy is ``error``.
        Dropped: The row has a defect whose policy is ``drop``.
    """
    if isinstance(row, BadRow):
        judge.refuse("bad_rows", line, row.reason)
    try:
        text = document_of(row)
    except RowError as error:
        judge.refuse("bad_rows", line, str(error))
    judge.tally.read_as("documents")
    judge.tally.columns |= row.keys() - set(TEXT_COLUMNS)
    judge.unread(unread_columns(row, TEXT_COLUMNS, None), line)
    for name in character_defects(text):
        judge.count(name, line)
    return readable(text)
