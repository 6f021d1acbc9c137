"""Train stage 3: direct preference optimization against a frozen reference (arXiv:2305.18290).

Shape letters: B pairs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignkit.batch import PackedBatch
from alignkit.errors import AlignkitError
from alignkit.modules.answers import refuse_other_counts
from alignkit.modules.gauges import RatedPairs
from alignkit.modules.given_loss import given_loss
from alignkit.modules.pair_scores import pair_scores, reference_pair_scores
from alignkit.modules.watch import PairWatch, WatchedModule
from alignkit.modules.whole_step import WholeStepModule, recomputed
from alignkit.objectives.preference import DPO, PairScores, PreferenceLoss
from alignkit.objectives.values import one_each


class DPOModule(WholeStepModule[PairScores], WatchedModule):
    """Train a policy to prefer chosen over rejected answers, relative to a frozen reference.

    The reference is a frozen deep copy of the policy, taken after ``init_from`` is loaded, unless
    ``reference`` names another. The copy shares the storage of the policy's frozen parameters, so
    under LoRA it adds only the memory of the adapters.

    A subclass with a new objective overrides `preference_loss`, and `metrics` to log more.

    Args:
        *args: As in `AlignmentModule`.
        loss: The loss to minimise: one of `alignkit.objectives.preference` by its name, or your own
            by its class path, each with its own parameters; ``DPO(beta=0.1)`` by default.
        reference: What the policy is compared with: a frozen ``copy`` of it as it starts, its
            ``base`` without adapters, a path (a checkpoint, a run's folder, an adapter, a model),
            or ``none``; by default a copy where the loss reads a reference, none where not.
        reference_every: Refresh a copy after so many optimizer steps (TR-DPO); ``null`` never does.
        reference_mix: Share of the policy in a refreshed reference; at 1 it is copied.
        reference_cache: A directory that keeps the reference's log-probs between runs; ``null``
            scores them live. They depend on base, adapter, tokens and dtype alone, so a sweep
            over learning rates or β scores each example once.
        reference_checks: Cached examples of each batch, drawn at random, that are scored again;
            their largest error is logged as ``ref/cache_abs_err`` and a wrong one stops the run.
        **kwargs: As in `AlignmentModule`.

    Raises:
        AlignkitError: No checks, or a base that cannot be loaded.
    """

    loss: PreferenceLoss

    def __init__(
        self,
        *args: Any,
        loss: PreferenceLoss = DPO(),  # noqa: B008 (frozen)
        reference: str | None = None,
        reference_every: int | None = None,
        reference_mix: float = 1.0,
        reference_cache: str | None = None,
        reference_checks: int = 1,
        **kwargs: Any,
    ) -> None:
        loss = given_loss(loss, PreferenceLoss, "DPO()")
        super().__init__(*args, **kwargs)
        self.loss = loss
        name, reads = type(self.loss).__name__, self.loss.uses_reference
        if self.loss.weighs_tokens and reference_cache is not None:
            raise AlignkitError(
                f"model.reference_cache: {name} weighs tokens, and the cache keeps sums over whole "
                "answers; leave it out"
            )
        self.watch = PairWatch(compares=reads)
        self.use_reference(
            name, reads, reference, every=reference_every, mix=reference_mix,
            cache=reference_cache, checks=reference_checks,
        )  # fmt: skip

    def scores(self, batch: PackedBatch, recompute: bool = False) -> tuple[PairScores, PairScores]:
        """Score a batch under policy and reference.

        Args:
            batch: The batch, on the module's device.
            recompute: Whether the backward pass computes the policy's activations again.

        Raises:
            AlignkitError: A prompt has not as many responses as the loss takes.
        """
        refuse_other_counts(batch, self.loss)
        # The reference comes first, so that its working memory is free again before the policy's
        # activations are allocated.
        # log π_ref(y_w|x), log π_ref(y_l|x)
        reference = self.reference_scores(batch) if self.reference is not None else None
        # log π_θ(y_w|x), log π_θ(y_l|x)
        score_policy = partial(pair_scores, self.model, batch, self.loss)
        policy = recomputed(score_policy) if recompute else score_policy()
        if reference is None:
            reference = policy.detached()
        self.check_start(batch)
        return policy, reference

    @torch.no_grad()
    def watched_metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
        """Return `metrics`, and add the pairs to the gauges."""
        self.watch.add(self._rated(policy, reference), self.training)
        return self.metrics(policy, reference)

    def reference_scores(self, batch: PackedBatch) -> PairScores:
        """Score the batch's answers under the frozen reference, live or from the cache.

        Raises:
            AlignkitError: The loss uses no reference, so there is none.
        """
        if self.reference is None:
            raise AlignkitError(
                f"reference: {type(self.loss).__name__} uses none, so none was kept"
            )
        return reference_pair_scores(self.reference, batch, self.loss)

    def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return one loss for each pair, [B] fp32; a new objective overrides it.

        Args:
            policy: Log-probabilities of both answers under the model in training; carries
                gradients.
            reference: The same under the frozen reference.
        """
        return self.loss(policy, reference)

    def metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
        """Return the metrics to log beside the loss: name to scalar, *summed* over the B pairs.

        They are logged as ``train/…`` and ``val/…``, divided by the number of pairs of a whole
        optimizer step or validation. A subclass adds its own to ``super().metrics(…)``. The method
        is called without gradients.

        Args:
            policy: As in `preference_loss`.
            reference: As in `preference_loss`.
        """
        logps = {"logps/chosen": policy.chosen.sum(), "logps/rejected": policy.rejected.sum()}
        return self._rated(policy, reference).sums() | logps

    def _rated(self, policy: PairScores, reference: PairScores) -> RatedPairs:
        rewards = self.loss.rewards(policy, reference)
        each = (one_each(values, policy.chosen, self.loss, "reward") for values in rewards)
        return RatedPairs(policy, reference, *each)
