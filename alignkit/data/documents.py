"""Provide data modules for documents, which train language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from alignkit.batch import PackedBatch
from alignkit.data.base import AlignmentDataModule
from alignkit.data.deal.stream import ExampleStream, head, tail
from alignkit.data.encode.documents import DocumentEncoder
from alignkit.data.encode.packing import Packing
from alignkit.data.keep.position import SOURCES, check_plan
from alignkit.data.read.rows import Source
from alignkit.data.read.sources import DataPath, find_splits
from alignkit.data.text.policies import DEFAULTS, Policies
from alignkit.data.text.recognise import check_columns
from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer

OPENWEBTEXT = "stas/openwebtext-10k"


class TextDataModule(AlignmentDataModule):
    """Provide documents as rows of ``block_size`` tokens, tokenized once.

    Args:
        tokenizer: See `AlignmentDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows are ``{"text": …}`` or ``{"content": …}``. A directory
            of ``.txt`` and ``.md`` files alone holds a document each, and so does one such file.
        block_size: Tokens of a row.
        streaming: Read and encode the training documents as training goes, in order and without
            end, instead of keeping them: for sets larger than the disk. The run needs
            ``trainer.max_steps``, and takes no ``examples_per_batch``, ``max_train_examples`` or
            weights of paths. Where the path has no other split, the first ``held_out`` documents
            are set apart for validation.
        held_out: See ``streaming``.
        packing: ``concatenate`` or ``best_fit``; see `alignkit.data.encode.packing.rows`.
        policies: What to do with each defect; see `Policies`.
        columns: ``{"text": …}`` where another column holds the documents.
        **options: Passed to `AlignmentDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        path: DataPath,
        *,
        block_size: int = 512,
        packing: Packing = "concatenate",
        streaming: bool = False,
        held_out: int = 500,
        policies: Policies | None = DEFAULTS,
        columns: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, path, **options)
        if streaming:
            self._refuse_with_streaming()
        self.streaming = streaming
        self.held_out = held_out
        self._stream: dict[str, list[Source]] = {}
        self._reading: ExampleStream | None = None
        self.block_size = block_size
        self.packing = packing
        self.policies = policies
        self.columns = check_columns(columns)

    def _refuse_with_streaming(self) -> None:
        """Refuse what needs the number of training examples, which a stream does not know."""
        given = {
            "examples_per_batch": self.examples_per_batch is not None,
            "max_train_examples": self.max_train_examples is not None,
            "path with weights": isinstance(self.path, Mapping),
        }
        for name in (name for name, there in given.items() if there):
            raise AlignkitError(
                f"data.{name}: does not go with data.streaming, which reads all rows of its "
                "sources in order, in batches of data.tokens_per_batch; leave one of them out"
            )

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> DocumentEncoder:
        """Return the encoder that turns documents into rows of tokens."""
        return DocumentEncoder(
            tokenizer,
            block_size=self.block_size,
            packing=self.packing,
            policies=self.policies,
            columns=self.columns,
        )

    def find_splits(self, place: str) -> dict[str, list[Source]]:
        """Find what to encode beforehand; with ``streaming``, all but the training split."""
        splits = find_splits(
            place, splits=self.splits, streaming=self.streaming, hashes=self._hashes
        )
        if self.streaming:
            train = splits.pop("train", [])
            if not splits:
                splits["validation"] = [head(source, self.held_out) for source in train]
                train = [tail(source, self.held_out) for source in train]
            self._stream[place] = train
        return splits

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Return packed training batches, in random order or in the order of the stream."""
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
        """Return the source and line of each example in a micro-batch; a stream is read again."""
        return self._reading.rows(number) if self._reading else super().rows_of_batch(number)


class OpenWebTextDataModule(TextDataModule):
    """Provide the documents of OpenWebText-10k: `TextDataModule` with its path.

    Args:
        tokenizer: See `AlignmentDataModule`.
        path: Where the documents lie, if not on the Hub.
        **options: Passed to `TextDataModule`.
    """

    def __init__(self, tokenizer: str, path: DataPath = OPENWEBTEXT, **options: Any) -> None:
        super().__init__(tokenizer, path, **options)
