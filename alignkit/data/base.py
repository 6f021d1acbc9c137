"""Define what data modules share: an encoded set for each split, dealt to ranks in batches."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from alignkit.data.deal.samplers import TokenBudgetBatchSampler
from alignkit.data.deal.workers import start_worker
from alignkit.data.encode.workers import workers_for
from alignkit.data.keep.cache import cache_root
from alignkit.data.keep.position import SETTINGS, Plan
from alignkit.data.keep.splits import RowEncoder, open_splits
from alignkit.data.keep.store import ExampleSet
from alignkit.data.keep.unsized import Unsized
from alignkit.data.read.hashes import FileHashes
from alignkit.data.read.rows import Source
from alignkit.data.read.slices import parse_splits
from alignkit.data.read.sources import DataPath, find_splits, not_read, weights_of
from alignkit.engine import PackedBatch, collate
from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer
from alignkit.models.text_format import TextFormat
from alignkit.models.tokenizer import vocabulary_size


class AlignmentDataModule(LightningDataModule):
    """Give encoded examples as packed batches; a subclass says how rows become examples.

    The training split is dealt in random order by `TokenBudgetBatchSampler`; a run resumes from
    a checkpoint at the very batch it would have had next. Validation and test examples are each
    shown once, however many ranks there are. A run may resume on another number of ranks: the
    rest of an epoch comes in the same order, see `alignkit.data.deal.elastic`.

    Args:
        tokenizer: A Hub id or a local directory.
        path: A Hub id (``name`` or ``name:configuration``), a local directory with ``train.*``
            and ``validation.*`` or ``test.*`` files (or whole sets of numbered shards), one that
            ``save_to_disk`` of the datasets library wrote, or one file (``.jsonl``, ``.json``,
            ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``, each also as ``.gz`` or ``.zst``). A
            list mixes several as they are; a mapping to weights makes each epoch draw from them
            in these shares.
        splits: What makes up each split, where that is not the standard names:
            ``{"train": "train_prefs[:5%]", "validation": "test_prefs"}``. Slices and sums are
            written as in the datasets library. What is not named is not read.
        tokens_per_batch: Most tokens in one micro-batch of one rank.
        examples_per_batch: Examples of one optimizer step, over all ranks and micro-batches,
            instead of a token budget.
        val_fraction: Share of the training rows set apart for validation and test, where the
            path has no split for either.
        seed: Seeds that share and every epoch's order.
        num_workers: Processes that collate ahead of the step.
        num_proc: Processes that encode what is not cached; any number makes the same files.
        cache_dir: Where encoded sets are kept; default ``$ALIGNKIT_CACHE`` or
            ``~/.cache/alignkit``.
        max_train_examples: Use only the first ones of each training source.
        max_val_examples: Use only the first ones of each validation and test source.

    Attributes:
        stats: After `setup`: numbers about the training split (rows, examples, tokens, a count
            for each defect, ``truncated_frac``), for logging.
        text_format: After `setup`: how text became tokens, which checkpoints keep.
    """

    # A rank may hold one evaluation batch less than another; evaluation does not synchronise.
    allow_zero_length_dataloader_with_multiple_devices = True
    # Whether loaders tell how many examples they have: a batch size finder would compare the number
    # with ``tokens_per_batch``.
    sized = True

    def __init__(
        self,
        tokenizer: str,
        path: DataPath,
        *,
        splits: dict[str, str] | None = None,
        tokens_per_batch: int = 4096,
        examples_per_batch: int | None = None,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int = 1,
        cache_dir: str | None = None,
        max_train_examples: int | None = None,
        max_val_examples: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise AlignkitError(f"data.val_fraction={val_fraction}: give a share between 0 and 1")
        for name, count, least in (("num_workers", num_workers, 0), ("num_proc", num_proc, 1)):
            if count < least:
                raise AlignkitError(f"data.{name}={count}: must be {least} or more")
        self.tokenizer = str(tokenizer)
        self.path = path
        parse_splits(splits)  # refuses what it cannot read, before any work
        self.splits = splits or None
        self.tokens_per_batch = tokens_per_batch
        self.examples_per_batch = examples_per_batch
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.max_train_examples = max_train_examples
        self.max_val_examples = max_val_examples
        self.stats: dict[str, float] = {}
        self.text_format: TextFormat | None = None
        self._loaded: PreTrainedTokenizerBase | None = None
        self._cache = cache_root(cache_dir)
        self._hashes = FileHashes(self._cache)
        self._sets: dict[str, ExampleSet] = {}
        self._quotas: list[tuple[int, int]] = []
        self._content: dict[str, Any] = {}
        self._plan: Plan = {}
        self._sampler: TokenBudgetBatchSampler | None = None
        self._position: dict[str, Any] = {}

    @property
    def vocabulary(self) -> int:
        """Return one above the tokenizer's largest id, 0 before `setup`; listing ids takes time."""
        return 0 if self._loaded is None else vocabulary_size(self._loaded)

    @abstractmethod
    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Return the encoder that turns this module's rows into examples."""

    def prepare_data(self) -> None:
        """Encode what is not cached yet; Lightning calls this in one process of each machine."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded splits; without `prepare_data` before, encode them too.

        Raises:
            AlignkitError: The data is missing, empty or bad, or a policy says ``error``.
        """
        if not self._sets:
            self._load()

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Return packed training batches in random order, from a resumed checkpoint's position."""
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        sampler = TokenBudgetBatchSampler(
            self._set("train").lengths,
            self.tokens_per_batch,
            examples_per_batch=self.examples_per_batch,
            shuffle=not overfit,
            seed=self.seed,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            quotas=self._quotas,
            content=self._content,
            rank=self._rank,
            world_size=self._world,
        )
        if self.trainer is not None:
            # A loader with workers draws before Lightning tells the sampler its epoch.
            sampler.set_epoch(self.trainer.current_epoch)
        if position := self.take_position():
            sampler.load_state_dict(position)
            recount = sampler.recount(position)
            if recount is not None and self.trainer is not None:
                self.trainer.callbacks.insert(0, recount)  # type: ignore[attr-defined]
        self._plan = sampler.fingerprint
        self._sampler = sampler
        return self.loader(self._set("train"), batch_sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        """Return packed batches of the validation split, every example once over all ranks."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[PackedBatch]:
        """Return packed batches of the test split, every example once over all ranks."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the training position: the epoch, its micro-batches done, and their plan."""
        if self.trainer is None:
            return {}
        begun: int = self.trainer.fit_loop.epoch_progress.current.started  # type: ignore[attr-defined]
        return {
            # Of the last micro-batch: Lightning's own is one ahead once training has ended.
            "epoch": max(begun - 1, 0),
            "batches": self.trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            "plan": self._plan,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a training position; the next training loader starts there."""
        self._position = state_dict

    def take_position(self) -> dict[str, Any]:
        """Return the position to resume at, once; it is empty in a fresh run.

        Raises:
            AlignkitError: The run goes on in the middle of an epoch of other data.
        """
        position, self._position = self._position, {}
        if not position and not self._plan and isinstance(self.trainer, Trainer):
            # Lightning hands a position to the data module whose class wrote it, or to nobody.
            done = self.trainer.fit_loop.epoch_loop.batch_progress
            if done.current.ready and not done.is_last_batch:
                raise AlignkitError(
                    f"resuming mid-epoch: the checkpoint has no position in the data of a "
                    f"{type(self).__qualname__}; resume with the data it was trained on, or start "
                    "anew from its weights with model.init_from"
                )
        return position

    def steps_ahead(self, epochs: int) -> int | None:
        """Count the optimizer steps from a resumed position to the end of ``epochs`` epochs.

        Returns:
            ``None`` if no training loader of known length was made.
        """
        return None if self._sampler is None else self._sampler.steps_ahead(epochs)

    def rows_of_batch(self, number: int) -> list[tuple[str, int]]:
        """Return the source and line of each example in a micro-batch of this rank's epoch.

        Args:
            number: Which of the epoch's micro-batches, from 0.
        """
        assert self._sampler is not None, "no training loader was made yet"
        examples = self._set("train")
        return [examples.place(index) for index in self._sampler.batch(number)]

    def find_splits(self, place: str) -> dict[str, list[Source]]:
        """Find the sources of each split that are to be encoded."""
        return find_splits(place, splits=self.splits, hashes=self._hashes)

    def _evaluation(self, split: str) -> DataLoader[PackedBatch]:
        sampler = TokenBudgetBatchSampler(
            self._set(split).lengths,
            self.tokens_per_batch,
            shuffle=False,
            equal=False,
            rank=self._rank,
            world_size=self._world,
        )
        return self.loader(self._set(split), batch_sampler=sampler, collate_fn=collate)

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Return a data loader with this module's number of workers."""
        workers = options.pop("num_workers", self.num_workers)
        if not self.sized and isinstance(dataset, ExampleSet):
            dataset = Unsized(dataset)
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a number whenever it starts: not from the stream that dropout draws
            # from, where a run resumed between two epochs would miss one.
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=start_worker,
            **options,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _set(self, split: str) -> ExampleSet:
        self.setup()
        if split not in self._sets:
            places = [] if self.splits else weights_of(self.path)
            others = filter(None, map(not_read, places))
            raise AlignkitError("; ".join([f"data.path {self.path}: no {split} split", *others]))
        return self._sets[split]

    def _load(self) -> None:
        self._loaded = tokenizer = load_tokenizer(self.tokenizer)
        with workers_for(encoder := self.row_encoder(tokenizer), self.num_proc) as workers:
            opened = open_splits(
                self.path,
                self.find_splits,
                encoder,
                cache=self._cache,
                val_fraction=self.val_fraction,
                seed=self.seed,
                max_train_examples=self.max_train_examples,
                max_val_examples=self.max_val_examples,
                announce=self._rank == 0,
                named=self.splits is not None,
                workers=workers,
            )
        self._sets, self._quotas, self.stats = opened.sets, opened.quotas, opened.stats
        self.text_format = opened.text_format
        settings = {**opened.content[SETTINGS], "splits": self.splits}
        self._content = {**opened.content, SETTINGS: settings}
