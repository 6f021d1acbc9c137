"""Connect a frozen reference to Lightning's hooks: when it is set up, checked and written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from alignkit.batch import PackedBatch
from alignkit.modules.base import AlignmentModule
from alignkit.modules.precision import step_dtype
from alignkit.modules.reference import Reference
from alignkit.modules.reference_choice import COPY, make_reference


class ReferencedModule(AlignmentModule):
    """Keep a frozen reference beside the policy, for a subclass whose loss needs one.

    Attributes:
        reference: The reference that `keep_reference` made, or ``None``.
    """

    reference: Reference | None

    def keep_reference(self, choice: str, cache: str | None, checks: int) -> None:
        """Make the reference and open its cache.

        Args:
            choice: See `make_reference`.
            cache: The cache's directory; ``None`` scores every batch live.
            checks: Number of cached examples of each batch that are scored again.
        """
        chosen = None
        if choice != COPY:
            tokenizer = self.hparams["tokenizer"] or self.base
            dtype = getattr(torch, self.hparams["dtype"])
            chosen = make_reference(choice, self.model, tokenizer, dtype)
        self.reference = Reference(self.model, self.compiles, chosen)
        if cache is not None:
            base = self.base_identity.fingerprint
            if self.hparams["resize_embeddings"]:  # more ids share the same probability
                base = f"{base}+{self.hparams['resize_embeddings']}"
            self.reference.open_cache(Path(cache), base, checks)
        # DDP synchronises parameters and buffers by name.
        self._ddp_params_and_buffers_to_ignore = [
            f"reference.{name}" for name in self.reference.tensor_names()
        ]

    def check_start(self, batch: PackedBatch) -> None:
        """Stop a run at its first batch if the policy does not score it as the reference does."""
        trainer = self._trainer
        if (
            self.reference is not None
            and self.training
            and trainer is not None
            and trainer.global_step == 0
            and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
        ):
            self.reference.check_start(self.model, batch, self.dropout)

    def setup(self, stage: str) -> None:
        """Choose the cache of the dtype that the trainer's precision computes in."""
        super().setup(stage)
        if self.reference is not None:
            self.reference.set_compute_dtype(step_dtype(self._trainer, self.model.dtype))

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Look up the batch in the cache while it is still on the CPU."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return batch if self.reference is None else self.reference.look_up(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """Log the largest error of the cached rows scored again, and refuse wrong ones."""
        super().on_train_batch_end(*args)
        if self.is_logged_step and self.reference is not None and self.reference.cache is not None:
            self._log("ref/cache_abs_err", self.reference.cache_error)
            self._check_cache()

    def on_validation_epoch_end(self) -> None:
        """Log the means, and write new rows of the cache if the others are right."""
        super().on_validation_epoch_end()
        self._write_cache()

    def on_test_epoch_end(self) -> None:
        """Log the means, and write new rows of the cache if the others are right."""
        super().on_test_epoch_end()
        self._write_cache()

    def on_train_end(self) -> None:
        """Write new rows of the cache if the others are right."""
        super().on_train_end()
        self._write_cache()

    def _check_cache(self) -> None:
        if self.reference is not None:
            self.reference.check_cache(step_dtype(self._trainer, self.model.dtype))

    def _write_cache(self) -> None:
        self._check_cache()
        if self.reference is not None:
            self.reference.write_cache()

    def on_fit_start(self) -> None:
        """Put the policy into training mode, and leave the reference in eval mode."""
        super().on_fit_start()
        # Lightning warns about modules in eval mode, in which the reference belongs.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def checkpoint_stamp(self) -> dict[str, Any]:
        """Return the stamp with the reference's fingerprint, which is empty without one."""
        fingerprint = "" if self.reference is None else self.reference.fingerprint
        return {**super().checkpoint_stamp(), "reference_fingerprint": fingerprint}
