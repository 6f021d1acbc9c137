"""Plain text for language modelling: OpenWebText."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from alignkit.data.base import AlignmentDataModule
from alignkit.data.deal.stream import ExampleStream, head, tail
from alignkit.data.encode.chunks import chunks
from alignkit.data.encode.packing import Document, Packing, rows
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.encode.writer import ExampleWriter
from alignkit.data.keep.position import SOURCES, check_plan
from alignkit.data.read.rows import BadRow, Row, Source
from alignkit.data.read.sources import DataPath, find_splits
from alignkit.data.text.defects import Dropped, Judge, character_defects, readable
from alignkit.data.text.fields import unread_columns
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.templated import Templated
from alignkit.engine import Example, PackedBatch
from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer
from alignkit.models.text_format import TextFormat

OPENWEBTEXT = "stas/openwebtext-10k"
TEXT_COLUMNS = frozenset(("text",))
_CHUNK = 64


class DocumentEncoder:
    """Encodes ``{"text": …}`` rows as rows of ``block_size`` tokens.

    Args:
        tokenizer: A fast tokenizer; what it puts before a text begins every document, and its EOS
            ends it.
        block_size: Tokens of a row.
        packing: See `alignkit.data.encode.packing.rows`.
        policies: What to do about rows that are bad, empty or hold control characters.
    """

    masked = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        packing: Packing,
        policies: Policies | None = None,
    ) -> None:
        self.policies = policies or Policies()
        self._encode = TextEncoder(tokenizer)
        self._templated = Templated(tokenizer)
        self._block_size = block_size
        self._packing = packing
        rows([], block_size, packing)  # refuses what it does not know, before any work

    @property
    def identity(self) -> dict[str, Any]:
        """Everything beside the documents that decides the rows."""
        return {
            "tokens": self._encode.fingerprint,
            "block_size": self._block_size,
            "packing": self._packing,
            "policies": vars(self.policies),
        }

    def write(self, source: Source, writer: ExampleWriter) -> dict[str, Any]:
        """Encode a source into a store; returns its counts as `Tally.to_dict`."""
        tally = Tally()
        for line, example in self.examples(source, tally):
            writer.add(example, line)
        return {**tally.to_dict(), "systems": [], "ends": [self._encode.eos]}

    def text_format(self, systems: Sequence[str], ends: Sequence[int]) -> TextFormat:
        """What generation must know of the rows; see `TextFormat`."""
        return TextFormat("text", self._block_size, ends=(self._encode.eos,))

    def examples(self, source: Source, tally: Tally) -> Iterator[tuple[int, Example]]:
        """The source's rows of tokens, with the line of each one's first document."""
        documents = self._documents(source, tally)
        for line, example in rows(documents, self._block_size, self._packing):
            tally.add("examples", line)
            yield line, example

    def _documents(self, source: Source, tally: Tally) -> Iterator[Document]:
        judge = Judge(source.name, self.policies, tally)
        for texts in chunks(self._texts(source, judge), _CHUNK):
            encoded = self._encode.prompts([text for _, text in texts], "text")
            for (line, _), ids in zip(texts, encoded, strict=True):
                yield line, [*ids, self._encode.eos]

    def _texts(self, source: Source, judge: Judge) -> Iterator[tuple[int, str]]:
        for line, row in source.rows():
            judge.tally.add("rows", line)
            try:
                text = self._templated.settle_document(_text(row, judge, line), judge, line)
                if not text.strip():
                    judge.refuse("empty_answers", line, "an empty document")
            except Dropped:
                continue
            yield line, text


def _text(row: Row, judge: Judge, line: int) -> str:
    """A row's text.

    Raises:
        AlignkitError: The row has a defect whose policy is ``error``.
        Dropped: The row has a defect whose policy is ``drop``.
    """
    reason = row.reason if isinstance(row, BadRow) else "the row has no `text`"
    text = None if isinstance(row, BadRow) else row.get("text")
    if isinstance(row, BadRow) or not isinstance(text, str):
        judge.refuse("bad_rows", line, reason)
    judge.tally.columns |= row.keys() - TEXT_COLUMNS
    judge.unread(unread_columns(row, TEXT_COLUMNS, None), line)
    for name in character_defects(text):
        judge.count(name, line)
    text = readable(text)
    if text.strip():
        judge.repeated(text, line)
    return text


class OpenWebTextDataModule(AlignmentDataModule):
    """Documents as rows of ``block_size`` tokens, tokenized once.

    Args:
        tokenizer: See `AlignmentDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows are ``{"text": …}``.
        block_size: Tokens of a row.
        streaming: Read and encode the training documents as training goes, in order and without
            end, instead of keeping them: for sets larger than the disk. The run needs
            ``trainer.max_steps``. Where the path has no other split, the first ``held_out``
            documents are set apart for validation.
        held_out: See ``streaming``.
        packing: ``concatenate`` or ``best_fit``; see `alignkit.data.encode.packing.rows`.
        policies: What to do with each defect; see `Policies`.
        **options: Passed to `AlignmentDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        path: DataPath = OPENWEBTEXT,
        *,
        block_size: int = 512,
        packing: Packing = "concatenate",
        streaming: bool = False,
        held_out: int = 500,
        policies: Policies | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, path, **options)
        self.streaming = streaming
        self.held_out = held_out
        self._stream: dict[str, list[Source]] = {}
        self._reading: ExampleStream | None = None
        self.block_size = block_size
        self.packing = packing
        self.policies = policies

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> DocumentEncoder:
        """Rows of documents."""
        return DocumentEncoder(
            tokenizer, block_size=self.block_size, packing=self.packing, policies=self.policies
        )

    def find_splits(self, place: str) -> dict[str, list[Source]]:
        """What is to be encoded beforehand: with ``streaming``, all but the training split."""
        splits = find_splits(place, streaming=self.streaming, hashes=self._hashes)
        if self.streaming:
            train = splits.pop("train", [])
            if not splits:
                splits["validation"] = [head(source, self.held_out) for source in train]
                train = [tail(source, self.held_out) for source in train]
            self._stream[place] = train
        return splits

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Packed batches: in random order, or as they stream in."""
        if not self.streaming:
            return super().train_dataloader()
        self.setup()
        trainer = self.trainer
        if trainer and (trainer.max_steps < 0 or trainer.limit_train_batches != 1.0):
            raise AlignkitError(
                "data.streaming=true: a stream is one endless epoch; "
                "set trainer.max_steps and leave trainer.limit_train_batches alone"
            )
        encoder = self.row_encoder(load_tokenizer(self.tokenizer))
        sources = [source for place in self._stream.values() for source in place]
        self._plan = {
            SOURCES: [{"name": each.name, "rows": each.digest} for each in sources],
            "streaming": True,
            "tokens_per_batch": self.tokens_per_batch,
            "world_size": self._world,
            "held_out": self.held_out,
            **encoder.identity,
        }
        position = self.take_position()
        skip = position.get("batches", 0)
        if skip:
            check_plan(position.get("plan"), self._plan)
        stream = ExampleStream(
            sources,
            encoder.examples,
            tokens_per_batch=self.tokens_per_batch,
            rank=self._rank,
            world_size=self._world,
            skip=skip,
        )
        self._reading = stream
        # More than one worker would each read the whole stream.
        return self.loader(stream, num_workers=min(self.num_workers, 1), batch_size=None)

    def rows_of_batch(self, number: int) -> list[tuple[str, int]]:
        """The source and line of each example in a micro-batch; a stream is read again for it."""
        return self._reading.rows(number) if self._reading else super().rows_of_batch(number)
