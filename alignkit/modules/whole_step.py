"""Compute a loss that compares answers with each other over all those of an optimizer step.

Such a loss (AOT sorts margins, KTO takes off a mean log-ratio) is no mean over micro-batches: each
gradient depends on all the other answers. Every micro-batch but the last is scored without keeping
its activations; at the last one, the scores of all micro-batches and ranks are put together, the
loss is computed over them, and the backward pass scores one micro-batch after another again. A step
costs one forward pass more for each micro-batch but its last, and the memory of one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.batch import PackedBatch
from alignkit.modules.refreshed import RefreshedModule
from alignkit.modules.tuning import mean_with_gradient_of_sum
from alignkit.modules.window import LossOutput
from alignkit.objectives.values import one_each

Scores = TypeVar("Scores", bound=Any)
"""A dataclass of tensors [B]: `PairScores` of pairs, `UnpairedScores` of answers."""


class WholeStepModule(RefreshedModule, Generic[Scores]):
    """Take steps over a loss of pairs or answers, which may compare all those of a step."""

    loss: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_scores: list[tuple[Scores, Scores]] = []

    @abstractmethod
    def scores(self, batch: PackedBatch, recompute: bool = False) -> tuple[Scores, Scores]:
        """Score a batch under policy and reference; see `recomputed`."""

    @abstractmethod
    def preference_loss(self, policy: Scores, reference: Scores) -> Tensor:
        """Return one loss for each pair or answer, [B] fp32."""

    @abstractmethod
    def watched_metrics(self, policy: Scores, reference: Scores) -> dict[str, Tensor]:
        """Return the metrics of a batch, as sums."""

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the summed loss of the batch alone; its weight is the number of losses."""
        policy, reference = self.scores(batch)
        # -log σ(β (log π_θ(y_w|x)/π_ref(y_w|x) - log π_θ(y_l|x)/π_ref(y_l|x))), equation 7 of DPO
        loss_B = self._losses(policy, reference)
        return LossOutput(loss_B.sum(), len(loss_B), self.watched_metrics(policy, reference))

    def _losses(self, policy: Scores, reference: Scores) -> Tensor:
        """Return one loss for each pair or answer, however anyone's objective made them."""
        values = self.preference_loss(policy, reference)
        if not type(self).preference_loss.__module__.startswith("alignkit."):
            return one_each(values, None, self)
        scores_B = getattr(policy, "chosen", getattr(policy, "answers", None))
        return one_each(values, scores_B, self.loss)

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Forget the scores of a step that was not taken."""
        super().on_train_batch_start(batch, batch_idx)
        if not self.window.micro_batches:
            self._step_scores.clear()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss with the gradient of its sum.

        Where the loss compares answers of several micro-batches or ranks, the step's last
        micro-batch has the whole loss and the others none. A subclass's own `compute_loss` is a
        mean over them.
        """
        if not self.loss.whole_step or type(self).compute_loss is not WholeStepModule.compute_loss:
            return super().training_step(batch, batch_idx)
        trainer = self.trainer
        if trainer.accumulate_grad_batches == trainer.world_size == 1:
            return super().training_step(batch, batch_idx)
        waits = trainer.fit_loop._should_accumulate()
        policy, reference = self.scores(batch, recompute=waits)
        self._step_scores.append((policy, reference))
        metrics, count = self.watched_metrics(policy, reference), batch.num_examples
        if waits:
            nothing = torch.zeros((), device=self.device, requires_grad=True)
            self.window.add(LossOutput(nothing, count, metrics), batch, batch_idx)
            return nothing
        ours, theirs = (of_all_ranks(each) for each in zip(*self._step_scores, strict=True))
        self._step_scores.clear()
        loss_B = self._losses(ours, theirs)
        # Every rank has computed the sum over all of them.
        share = LossOutput(loss_B.sum().detach() / trainer.world_size, count, metrics)
        self.window.add(share, batch, batch_idx)
        return mean_with_gradient_of_sum(loss_B.sum(), len(loss_B))


def recomputed(make: Callable[[], Scores]) -> Scores:
    """Return scores without their activations, which the backward pass computes again."""
    kind: list[Any] = []

    def values() -> tuple[Tensor | None, ...]:
        scores = make()
        kind.append(type(scores))
        return tuple(getattr(scores, field.name) for field in fields(scores))

    found = checkpoint(values, use_reentrant=False)
    made: Scores = _made(kind[0], found)
    return made


def of_all_ranks(own: Sequence[Scores]) -> Scores:
    """Return the scores of all micro-batches and ranks; those of other ranks have no gradient."""
    mine = _joined(own)
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    values = [getattr(mine, field.name) for field in fields(mine)]
    device = next(value.device for value in values if value is not None)
    sent = [value if value is None else value.detach().cpu() for value in values]
    gathered: list[list[Tensor | None]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sent)
    ranks = [
        _made(type(mine), [v if v is None else v.to(device) for v in each]) for each in gathered
    ]
    ranks[dist.get_rank()] = mine
    return _joined(ranks)


def _joined(parts: Sequence[Scores]) -> Scores:
    columns: list[Tensor | None] = []
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        columns.append(None if any(v is None for v in values) else torch.cat(values))
    return _made(type(parts[0]), columns)


def _made(kind: type[Scores], values: Sequence[Tensor | None]) -> Scores:
    made: Scores = kind(**dict(zip((f.name for f in fields(kind)), values, strict=True)))
    return made
