"""Train on unpaired answers, good ones and bad ones, against a frozen reference (KTO).

Shape letters: B answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from alignkit.batch import PackedBatch
from alignkit.engine import response_sums, score
from alignkit.errors import AlignkitError
from alignkit.modules.given_loss import given_loss
from alignkit.modules.whole_step import WholeStepModule, recomputed
from alignkit.modules.window import LossOutput
from alignkit.objectives.unpaired import KTO, UnpairedScores
from alignkit.utils.exact import exact

_PARTS = {"chosen": "good", "rejected": "bad"}
"""TRL's names of the means over good and over bad answers, and the names of their counts."""
_HELD_OUT = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")


class KTOModule(WholeStepModule[UnpairedScores]):
    """Train a policy on answers that are each good or bad, without pairs (arXiv:2402.01306).

    Its data come from an `UnpairedDataModule`: every prompt has its answer and a mismatched one.
    The mean log-ratio of the mismatched ones of an optimizer step, of all its micro-batches and
    ranks, is the reference point. A validation takes that of all its rows. No loss depends on how
    rows are cut into batches.

    Args:
        *args: As in `AlignmentModule`.
        loss: β and the weights of good and bad answers.
        reference: As in `DPOModule`.
        reference_every: As in `DPOModule`.
        reference_mix: As in `DPOModule`.
        reference_cache: As in `DPOModule`.
        reference_checks: As in `DPOModule`.
        **kwargs: As in `AlignmentModule`.

    Raises:
        AlignkitError: As `DPOModule`.
    """

    loss: KTO

    def __init__(
        self,
        *args: Any,
        loss: KTO = KTO(),  # noqa: B008 (frozen)
        reference: str | None = None,
        reference_every: int | None = None,
        reference_mix: float = 1.0,
        reference_cache: str | None = None,
        reference_checks: int = 1,
        **kwargs: Any,
    ) -> None:
        loss = given_loss(loss, KTO, "KTO()")
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.use_reference(
            "KTO", True, reference, every=reference_every, mix=reference_mix,
            cache=reference_cache, checks=reference_checks,
        )  # fmt: skip
        self.held_out = nn.ModuleDict({key(name): HeldOut(self.loss, name) for name in _HELD_OUT})

    def scores(
        self, batch: PackedBatch, recompute: bool = False
    ) -> tuple[UnpairedScores, UnpairedScores]:
        """Score a batch under the policy and under the reference.

        Args:
            batch: The batch, on the module's device.
            recompute: Whether the backward pass computes the policy's activations again.

        Raises:
            AlignkitError: The batch has no labels, or not two answers a prompt.
        """
        good_B = batch.labels
        if good_B is None or any(len(span.responses) != 2 for span in batch.spans):
            raise AlignkitError(
                "data: KTO needs an answer a prompt with a label, and a mismatched one; use "
                "UnpairedDataModule"
            )
        assert self.reference is not None
        # The reference comes first, as in DPO.
        theirs = UnpairedScores.from_responses(self.reference.sums(batch), good_B)

        def score_policy() -> UnpairedScores:
            sums_R = response_sums(score(self.model, batch), batch)
            return UnpairedScores.from_responses(sums_R, good_B)

        ours = recomputed(score_policy) if recompute else score_policy()
        self.check_start(batch)
        return ours, theirs

    def preference_loss(self, policy: UnpairedScores, reference: UnpairedScores) -> Tensor:
        """Return the loss of each answer against the reference point of all of them, [B] fp32."""
        return self.loss(policy, reference)

    @torch.no_grad()
    def watched_metrics(
        self, policy: UnpairedScores, reference: UnpairedScores
    ) -> dict[str, Tensor]:
        """Return what is logged beside the loss, summed over the B answers.

        ``rewards/…`` and ``logps/…`` of good (``chosen``) and bad (``rejected``) answers become
        means over the answers of their kind, and ``kl`` the reference point of all.
        """
        good_B = exact(policy.good)
        rewards_B = exact(self.loss.rewards(policy, reference))
        found = {"kl": exact(policy.mismatched - reference.mismatched).sum()}
        for name, kind_B in (("chosen", good_B), ("rejected", 1 - good_B)):
            found[_PARTS[name]] = kind_B.sum()
            found[f"rewards/{name}"] = (rewards_B * kind_B).sum()
            found[f"logps/{name}"] = (exact(policy.answers) * kind_B).sum()
        return found

    def logged_means(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return z₀, and means over the answers of a kind, without those of which there is none."""
        shown = {**means, "kl": means["kl"].clamp(min=0)}
        for name, kind in _PARTS.items():
            share = shown.pop(kind)
            for what in (f"rewards/{name}", f"logps/{name}"):
                total = shown.pop(what)
                if share > 0:
                    shown[what] = total / share
        if {"rewards/chosen", "rewards/rejected"} <= shown.keys():
            shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
        return shown

    def logged_totals(self, totals: LossOutput) -> LossOutput:
        """Return the totals of an epoch that are sums over all answers: that of the loss."""
        return replace(totals, metrics={})

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add the batch's log-ratios, of which the validation's end computes the loss."""
        policy, reference = self.scores(batch)
        for each in self.held_out.values():
            cast(HeldOut, each).update(policy, reference)

    def on_validation_epoch_start(self) -> None:
        """Begin a validation."""
        super().on_validation_epoch_start()
        self._reset()

    def on_test_epoch_start(self) -> None:
        """Begin a test."""
        super().on_test_epoch_start()
        self._reset()

    def _reset(self) -> None:
        for each in self.held_out.values():
            cast(HeldOut, each).reset()

    def _log_evaluation(self, stage: str) -> None:
        seen = cast(HeldOut, self.held_out["loss"]).good
        good = torch.cat(seen) if seen else torch.zeros(0, device=self.device)
        counts = self._sum_over_ranks(torch.stack((good.sum(), (1 - good).sum())))
        there = dict(zip(_PARTS, (counts > 0).tolist(), strict=True))
        there["margins"] = all(there.values())
        for name in _HELD_OUT:
            if not there.get(name.rpartition("/")[2], True):
                continue
            each = cast(HeldOut, self.held_out[key(name)])
            attribute = f"held_out.{key(name)}"
            bar = name == "loss"
            self.log(f"{stage}/{name}", each, prog_bar=bar, metric_attribute=attribute)


class HeldOut(Metric):
    """Compute a number of all the answers of a validation together, over batches and ranks.

    Args:
        loss: The loss.
        name: Which number: the loss, z₀, or a mean reward.
    """

    full_state_update = False
    ratios: list[Tensor]
    mismatched: list[Tensor]
    good: list[Tensor]

    def __init__(self, loss: KTO, name: str) -> None:
        super().__init__()
        self.loss, self.name = loss, name
        for state in ("ratios", "mismatched", "good"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, policy: UnpairedScores, reference: UnpairedScores) -> None:
        """Add a batch."""
        self.ratios.append((policy.answers - reference.answers).detach())
        self.mismatched.append((policy.mismatched - reference.mismatched).detach())
        self.good.append(policy.good.float())  # which a rank without answers has as well

    def compute(self) -> Tensor:
        """Return the number, fp32."""
        ratios, mismatched, good = map(_joined, (self.ratios, self.mismatched, self.good))
        rewards, good = self.loss.beta * ratios, good.bool()
        chosen, rejected = rewards[good].mean(), rewards[~good].mean()
        if self.name == "loss":
            zero = torch.zeros_like(ratios)
            ours = UnpairedScores(ratios, mismatched, good)
            return self.loss(ours, UnpairedScores(zero, zero, good)).mean()
        return {
            "kl": self.loss.point(mismatched),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
        }[self.name]


def key(name: str) -> str:
    """Return a name as a submodule may have it."""
    return name.replace("/", "_")


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
