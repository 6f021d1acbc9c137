"""Stage 3: direct preference optimization against a frozen reference.

Shape letters: B pairs, R = 2B responses.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import PackedBatch, compile_blocks, response_lengths, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora.identity import trained_fingerprint
from alignkit.models.noise import adapters_quiet
from alignkit.modules.base import AlignmentModule
from alignkit.modules.precision import computed_in
from alignkit.modules.reference import ReferenceCache, ReferencedBatch, refuse_error
from alignkit.modules.window import LossOutput
from alignkit.objectives.preference import DPO, PairScores, PreferenceLoss

# A policy that is its reference's copy scores the same row through the same kernels: what is
# left is the kernels' own nondeterminism.
STEP_0_TOLERANCE = 1e-4
# Nats, for a response of some hundred tokens: other rows beside it change a sum's rounding.
CACHE_TOLERANCE = {
    torch.float64: 1e-2,  # log-probs are fp32 there too
    torch.float32: 1e-2,
    torch.float16: 0.25,
    torch.bfloat16: 2.0,
}


class DPOModule(AlignmentModule):
    """Preference optimization: raise chosen over rejected answers, tied to a reference by β.

    The reference is a frozen deep copy of the policy, taken after ``init_from`` is loaded. The
    copy shares the storage of whatever is frozen in the policy, so under LoRA it costs the
    adapters alone.

    A new objective overrides `preference_loss`.

    Args:
        *args: As in `AlignmentModule`.
        loss: What is minimised: one of `alignkit.objectives.preference` by its name, or your own by
            its class path, each with its own parameters; ``DPO(beta=0.1)`` by default.
        reference_cache: A directory that keeps the reference's log-probs between runs; ``null``
            scores them live. They depend on base, adapter, tokens and dtype alone, so a sweep
            over learning rates or β scores each example once.
        reference_checks: Cached examples of each batch, drawn at random, that are scored again;
            their largest error is logged as ``ref/cache_abs_err`` and a wrong one stops the run.
        **kwargs: As in `AlignmentModule`.

    Raises:
        AlignkitError: No checks, or a base that cannot be loaded.
    """

    def __init__(
        self,
        *args: Any,
        loss: PreferenceLoss = DPO(),  # noqa: B008 (frozen)
        reference_cache: str | None = None,
        reference_checks: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if reference_checks < 1:
            raise AlignkitError(f"model.reference_checks={reference_checks}: give at least 1")
        # A checkpoint's hyper-parameters hold the loss as plain values.
        self.loss = PreferenceLoss.from_dict(loss) if isinstance(loss, Mapping) else loss
        self.reference: PreTrainedModel | None = None
        self.reference_fingerprint = ""
        self.cache: ReferenceCache | None = None
        self._cache_error = torch.zeros(())
        self._agreed = False  # once seen to start as the reference, the policy may leave it
        if self.loss.uses_reference:
            self._take_reference(reference_cache, reference_checks)
        elif reference_cache is not None:
            raise AlignkitError(
                f"model.reference_cache: {type(self.loss).__name__} uses no reference; leave it out"
            )

    def _take_reference(self, cache: str | None, checks: int) -> None:
        """Copy the policy as it is now, and open the cache of what the copy scores."""
        self.reference = frozen_copy(self.model)
        if self.compiles:  # a copy is not compiled
            compile_blocks(self.reference)
        self.reference_fingerprint = trained_fingerprint(self.reference)
        if cache is not None:
            self.cache = ReferenceCache(Path(cache), self._reference_name(), checks)
        # DDP synchronises parameters and buffers by name; the reference never changes.
        self._ddp_params_and_buffers_to_ignore = [
            f"reference.{name}" for name in self.reference.state_dict(keep_vars=True)
        ]

    def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return one loss a pair, [B] fp32: what a new objective overrides.

        Args:
            policy: Log-probabilities of both answers under the model in training; carries
                gradients.
            reference: The same under the frozen reference.
        """
        return self.loss(policy, reference)

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Score both answers under policy and reference; a batch weighs its pairs."""
        if batch.num_responses != 2 * batch.num_examples:
            raise AlignkitError(
                "data: DPO needs exactly two responses a prompt, chosen before rejected; use "
                "HHPreferenceDataModule"
            )
        # The reference first: its working memory does not come on top of the policy's activations.
        reference = self.reference_scores(batch) if self.reference is not None else None
        policy = pair_scores(self.model, batch)
        if reference is None:
            reference = policy.detached()
        elif self._is_first_step():
            self._check_first_step(batch)
        loss_B = self.preference_loss(policy, reference)
        return LossOutput(loss_B.sum(), len(loss_B), self._metrics(policy, reference))

    def reference_scores(self, batch: PackedBatch) -> PairScores:
        """Score the batch's answers under the frozen reference, live or from the cache.

        Raises:
            AlignkitError: The loss uses no reference, so there is none.
        """
        return PairScores.from_responses(self._reference_sums(batch), response_lengths(batch))

    def _reference_sums(self, batch: PackedBatch) -> Tensor:
        if self.cache is None or not isinstance(batch, ReferencedBatch):
            return self._live_sums(batch)
        live_R = self._live_sums(batch.probe)
        self.cache.add(batch, live_R)
        error = (batch.known_R[batch.probe_R] - live_R).abs().nan_to_num(0.0).max()
        self._cache_error = torch.maximum(self._cache_error.to(error.device), error)
        return batch.known_R.index_copy(0, batch.probe_R, live_R)

    def _live_sums(self, batch: PackedBatch) -> Tensor:
        if self.reference is None:
            raise AlignkitError(
                f"reference: {type(self.loss).__name__} uses none, so none was kept"
            )
        with torch.inference_mode():
            sums_R = response_sums(score(self.reference, batch), batch)
        return sums_R.clone()  # out here an ordinary tensor, which a loss may keep for its gradient

    def setup(self, stage: str) -> None:
        """Keep cached log-probs apart by the dtype that the trainer's precision computes in."""
        super().setup(stage)
        if self.cache is not None and self.cache.home.name != self._reference_name():
            cache = self.cache
            self.cache = ReferenceCache(cache.home.parent, self._reference_name(), cache.checks)

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Look the batch up in the cache while it is still on the CPU."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return batch if self.cache is None else self.cache.look_up(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """Log the largest error of the cached rows that were scored again; stop at a wrong one."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.cache is not None and self.global_step % max(every, 1) == 0:
            self._log("ref/cache_abs_err", self._cache_error)
            tolerance = CACHE_TOLERANCE[computed_in(self._trainer, self.model.dtype)]
            refuse_error(self._cache_error.item(), tolerance, self.cache.home)
            self._cache_error = torch.zeros(())

    def on_validation_epoch_end(self) -> None:
        """Log the means, and keep what the cache learned."""
        super().on_validation_epoch_end()
        if self.cache is not None:
            self.cache.write()

    def on_train_end(self) -> None:
        """Keep what the cache learned."""
        if self.cache is not None:
            self.cache.write()

    def on_fit_start(self) -> None:
        """Put the policy, and it alone, in training mode."""
        super().on_fit_start()
        # Lightning counts modules in eval mode and warns; the reference is meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def train(self, mode: bool = True) -> DPOModule:
        """Set the mode of everything but the reference, which stays in eval."""
        super().train(mode)
        if self.reference is not None:
            self.reference.train(False)
        return self

    def checkpoint_stamp(self) -> dict[str, Any]:
        """Return the base's stamp with the reference's fingerprint."""
        return {**super().checkpoint_stamp(), "reference_fingerprint": self.reference_fingerprint}

    def _reference_name(self) -> str:
        stored = self.model.dtype
        computed = computed_in(self._trainer, stored)
        # Weights that autocast rounds on the way are not those of a base stored so.
        dtypes = [stored] if computed == stored else [stored, computed]
        dtype = "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{self.base_identity.fingerprint}-{self.reference_fingerprint}-{dtype}"

    def _metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
        with torch.no_grad():
            chosen_B, rejected_B = self.loss.rewards(policy, reference)
            return {
                "rewards/chosen": chosen_B.sum(),
                "rewards/rejected": rejected_B.sum(),
                "rewards/accuracies": (chosen_B > rejected_B).sum(),
                "rewards/margins": (chosen_B - rejected_B).sum(),
                "logps/chosen": policy.chosen.sum(),
                "logps/rejected": policy.rejected.sum(),
            }

    def _is_first_step(self) -> bool:
        trainer = self._trainer
        return bool(
            self.training
            and not self._agreed
            and trainer is not None
            and trainer.global_step == 0
            and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
        )

    @torch.no_grad()
    def _check_first_step(self, batch: PackedBatch) -> None:
        """Stop a run whose policy does not start as its reference.

        Measured in training mode, where noise in the base would show, but without the dropout of
        adapters, which is meant; with ``dropout`` the base's own is meant too.
        """
        self.model.train(not self.dropout)
        with adapters_quiet(self.model):
            policy = pair_scores(self.model, batch)
        self.model.train()
        # Cached rows were rounded in other rows.
        reference = PairScores.from_responses(self._live_sums(batch), response_lengths(batch))
        gap = torch.stack([policy.chosen - reference.chosen, policy.rejected - reference.rejected])
        worst = gap.abs().max().item()
        scale = policy.rejected.abs().max().item() + 1.0
        # A policy that is not finite itself is stopped for that, with its rows.
        if worst > STEP_0_TOLERANCE * scale:
            raise AlignkitError(
                f"model: policy and reference differ by {worst:.3g} nats before the first step, so "
                "rewards would not start at 0; the policy was changed after the reference was "
                "copied, or its forward pass is not deterministic"
            )
        self._agreed = True


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Deep-copy a model, sharing the parameters that are frozen in it and all its buffers.

    Args:
        model: The policy.

    Returns:
        The copy in eval mode with nothing trainable.
    """
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    copied: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    copied.requires_grad_(False)  # what is shared was frozen before
    copied.train(False)
    return copied


def pair_scores(model: PreTrainedModel, batch: PackedBatch) -> PairScores:
    """Score B pairs under one model: `PairScores` of [B] sums, fp32."""
    sums_R = response_sums(score(model, batch), batch)
    return PairScores.from_responses(sums_R, response_lengths(batch))
