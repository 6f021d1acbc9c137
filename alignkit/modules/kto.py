"""Train on unpaired answers, good ones and bad ones, against a frozen reference (KTO).

Shape letters: B answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from alignkit.batch import PackedBatch
from alignkit.engine import response_sums, score
from alignkit.errors import AlignkitError
from alignkit.modules.refreshed import RefreshedModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.unpaired import KTO, UnpairedScores

_PARTS = {"chosen": "good", "rejected": "bad"}
"""TRL's names of the means over good and over bad answers, and the names of their counts."""
_HELD_OUT = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")


class KTOModule(RefreshedModule):
    """Train a policy on answers that are each good or bad, without pairs (arXiv:2402.01306).

    Its data come from an `UnpairedDataModule`: every prompt has its answer and a mismatched one.
    The mean log-ratio of the mismatched ones of all ranks' micro-batches is the reference point. A
    validation takes that of all its rows, so that its loss depends on no batch.

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
        super().__init__(*args, **kwargs)
        # A checkpoint's hyper-parameters hold the loss as plain values.
        self.loss = KTO.from_dict(loss) if isinstance(loss, Mapping) else loss
        self.use_reference(
            "KTO", True, reference, every=reference_every, mix=reference_mix,
            cache=reference_cache, checks=reference_checks,
        )  # fmt: skip
        self.held_out = nn.ModuleDict({key(name): HeldOut(self.loss, name) for name in _HELD_OUT})

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the summed loss of the batch's answers; its weight is their number."""
        policy, reference = self.scores(batch)
        ratios_B = (policy.mismatched - reference.mismatched).detach()
        sums = torch.stack((ratios_B.double().sum(), ratios_B.new_tensor(len(ratios_B)).double()))
        if self.training and self._trainer is not None:
            sums = self._sum_over_ranks(sums.clone())  # gloo reduces in place
        point = (sums[0] / sums[1]).clamp(min=0).float()
        loss_B = self.loss(policy, reference, point)
        with torch.no_grad():
            metrics = self.metrics(policy, reference, point)
        return LossOutput(loss_B.sum(), len(loss_B), metrics)

    def scores(self, batch: PackedBatch) -> tuple[UnpairedScores, UnpairedScores]:
        """Score a batch under the policy and under the reference.

        Raises:
            AlignkitError: The batch has no labels, or not two answers a prompt.
        """
        if batch.labels is None or any(len(span.responses) != 2 for span in batch.spans):
            raise AlignkitError(
                "data: KTO needs an answer a prompt with a label, and a mismatched one; use "
                "UnpairedDataModule"
            )
        assert self.reference is not None
        # The reference comes first, as in DPO.
        theirs_R = self.reference.sums(batch)
        ours_R = response_sums(score(self.model, batch), batch)
        self.check_start(batch)
        ours = UnpairedScores.from_responses(ours_R, batch.labels)
        return ours, UnpairedScores.from_responses(theirs_R, batch.labels)

    def metrics(
        self, policy: UnpairedScores, reference: UnpairedScores, point: Tensor
    ) -> dict[str, Tensor]:
        """Return what is logged beside the loss, summed over the B answers.

        ``rewards/…`` and ``logps/…`` of good (``chosen``) and bad (``rejected``) answers become
        means over the answers of their kind.
        """
        good_B = policy.good.double()
        rewards_B = self.loss.rewards(policy, reference).double()
        found = {"kl": point * len(good_B)}
        for name, kind_B in (("chosen", good_B), ("rejected", 1 - good_B)):
            found[_PARTS[name]] = kind_B.sum()
            found[f"rewards/{name}"] = (rewards_B * kind_B).sum()
            found[f"logps/{name}"] = (policy.answers.double() * kind_B).sum()
        return found

    def logged_means(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return means over the answers of a kind in the place of means over all answers."""
        shown = {name: value for name, value in means.items() if name not in _PARTS.values()}
        for name, kind in _PARTS.items():
            for what in ("rewards", "logps"):
                shown[f"{what}/{name}"] = means[f"{what}/{name}"] / means[kind]
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
        return shown

    def logged_totals(self, totals: LossOutput) -> LossOutput:
        """Return the totals of an epoch that are sums over all answers."""
        return replace(totals, metrics={"kl": totals.metrics["kl"]})

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
        for name in _HELD_OUT:
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
        self.good.append(policy.good)

    def compute(self) -> Tensor:
        """Return the number, fp32; NaN where there is no answer of its kind."""
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
