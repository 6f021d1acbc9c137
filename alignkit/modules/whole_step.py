"""Compute a loss that compares pairs with each other over all pairs of an optimizer step.

Such a loss (AOT sorts margins) is no mean over micro-batches: each pair's gradient depends on all
the others. Every micro-batch but the last is scored without keeping its activations; at the last
one, the scores of all micro-batches and ranks are put together, the loss is computed over them, and
the backward pass scores one micro-batch after another again. A step costs one forward pass more for
each micro-batch but its last, and the memory of one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.modules.pair_scores import pair_scores
from alignkit.modules.tuning import mean_with_gradient_of_sum
from alignkit.modules.watch import WatchedModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.pairs import PairScores, PreferenceLoss


class WholeStepModule(WatchedModule):
    """Take steps over a loss of pairs, which may compare all pairs of a step."""

    loss: PreferenceLoss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_pairs: list[tuple[PairScores, PairScores]] = []

    @abstractmethod
    def scores(self, batch: PackedBatch, recompute: bool = False) -> tuple[PairScores, PairScores]:
        """Score a batch under policy and reference; see `recomputed_scores`."""

    @abstractmethod
    def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return one loss for each pair, [B] fp32."""

    @abstractmethod
    def watched_metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
        """Return the metrics of a batch, as sums."""

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Forget the pairs of a step that was not taken."""
        super().on_train_batch_start(batch, batch_idx)
        if not self.window.micro_batches:
            self._step_pairs.clear()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss with the gradient of its sum.

        Where the loss compares pairs of several micro-batches or ranks, the step's last micro-batch
        has the whole loss and the others none.
        """
        if not self.loss.whole_step:
            return super().training_step(batch, batch_idx)
        trainer = self.trainer
        if trainer.accumulate_grad_batches == trainer.world_size == 1:
            return super().training_step(batch, batch_idx)
        waits = trainer.fit_loop._should_accumulate()
        policy, reference = self.scores(batch, recompute=waits)
        self._step_pairs.append((policy, reference))
        metrics, count = self.watched_metrics(policy, reference), len(policy.chosen)
        if waits:
            nothing = torch.zeros((), device=self.device, requires_grad=True)
            self.window.add(LossOutput(nothing, count, metrics), batch, batch_idx)
            return nothing
        ours, theirs = (of_all_ranks(each) for each in zip(*self._step_pairs, strict=True))
        self._step_pairs.clear()
        loss_B = self.preference_loss(ours, theirs)
        # Every rank has computed the sum over all of them.
        share = LossOutput(loss_B.sum().detach() / trainer.world_size, count, metrics)
        self.window.add(share, batch, batch_idx)
        return mean_with_gradient_of_sum(loss_B.sum(), len(loss_B))


def recomputed_scores(
    model: PreTrainedModel, batch: PackedBatch, loss: PreferenceLoss
) -> PairScores:
    """Return `pair_scores` without their activations, which the backward pass computes again."""
    names = [field.name for field in fields(PairScores)]

    def values() -> tuple[Tensor | None, ...]:
        scores = pair_scores(model, batch, loss)
        return tuple(getattr(scores, name) for name in names)

    return PairScores(**dict(zip(names, checkpoint(values, use_reentrant=False), strict=True)))


def of_all_ranks(own: Sequence[PairScores]) -> PairScores:
    """Return the pairs of all micro-batches and ranks; those of other ranks have no gradient."""
    mine = _joined(own)
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    sent = {field.name: getattr(mine, field.name) for field in fields(PairScores)}
    sent = {name: value if value is None else value.detach().cpu() for name, value in sent.items()}
    gathered: list[dict[str, Tensor | None]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sent)
    device = mine.chosen.device
    ranks = [
        PairScores(**{n: v if v is None else v.to(device) for n, v in each.items()})  # type: ignore[arg-type]
        for each in gathered
    ]
    ranks[dist.get_rank()] = mine
    return _joined(ranks)


def _joined(parts: Sequence[PairScores]) -> PairScores:
    columns: dict[str, Tensor | None] = {}
    for field in fields(PairScores):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if any(v is None for v in values) else torch.cat(values)
    return PairScores(**cast(dict[str, Any], columns))
