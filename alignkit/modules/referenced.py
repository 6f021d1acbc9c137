"""A module beside its reference in Lightning: when the reference is named, checked and written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from alignkit.batch import PackedBatch
from alignkit.modules.base import AlignmentModule
from alignkit.modules.precision import computed_in
from alignkit.modules.reference import Reference


class ReferencedModule(AlignmentModule):
    """An alignment module that may keep a frozen reference; a subclass says what its loss is.

    Attributes:
        reference: What `keep_reference` has made, or ``None``.
    """

    reference: Reference | None

    def keep_reference(self, cache: str | None, checks: int) -> None:
        """Copy the policy as it is now, and open the cache of what the copy scores.

        Args:
            cache: The cache's directory; ``None`` scores every batch live.
            checks: Cached examples of each batch that are scored again.
        """
        self.reference = Reference(self.model, self.compiles)
        if cache is not None:
            self.reference.open_cache(Path(cache), self.base_identity.fingerprint, checks)
        # DDP synchronises parameters and buffers by name.
        self._ddp_params_and_buffers_to_ignore = [
            f"reference.{name}" for name in self.reference.tensor_names()
        ]

    def check_start(self, batch: PackedBatch) -> None:
        """Stop a run at its first batch if the policy does not start as its reference."""
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
        """Keep cached log-probs apart by the dtype that the trainer's precision computes in."""
        super().setup(stage)
        if self.reference is not None:
            self.reference.compute_in(computed_in(self._trainer, self.model.dtype))

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Look the batch up in the cache while it is still on the CPU."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return batch if self.reference is None else self.reference.look_up(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """Log the largest error of the cached rows that were scored again; stop at a wrong one."""
        if self.reference is None or self.reference.cache is None:
            return
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step % max(every, 1) == 0:
            self._log("ref/cache_abs_err", self.reference.cache_error)
            self.reference.check_cache(computed_in(self._trainer, self.model.dtype))

    def on_validation_epoch_end(self) -> None:
        """Log the means, and keep what the cache learned."""
        super().on_validation_epoch_end()
        if self.reference is not None:
            self.reference.write_cache()

    def on_train_end(self) -> None:
        """Keep what the cache learned."""
        if self.reference is not None:
            self.reference.write_cache()

    def on_fit_start(self) -> None:
        """Put the policy, and it alone, in training mode."""
        super().on_fit_start()
        # Lightning counts modules in eval mode and warns; the reference is meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def checkpoint_stamp(self) -> dict[str, Any]:
        """Return the base's stamp with the reference's fingerprint, empty where there is none."""
        fingerprint = "" if self.reference is None else self.reference.fingerprint
        return {**super().checkpoint_stamp(), "reference_fingerprint": fingerprint}
