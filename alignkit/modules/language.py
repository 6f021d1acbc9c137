"""Train with cross-entropy over scored tokens, the loss of language modelling and SFT."""

from __future__ import annotations

from alignkit.engine import PackedBatch, score_with_stats
from alignkit.modules.answers import refuse_rejected_answers
from alignkit.modules.base import AlignmentModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.language import cross_entropy_sum


class LanguageModule(AlignmentModule):
    """Minimise the mean negative log-likelihood of the scored tokens, in nats."""

    perplexity = True

    def setup(self, stage: str) -> None:
        """Refuse data in which some answers are not to be imitated."""
        super().setup(stage)
        refuse_rejected_answers(self)

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the summed cross-entropy, and in validation token accuracy and entropy."""
        scores = score_with_stats(self.model, batch, stats=not self.training)
        metrics = {}
        if scores.correct is not None and scores.entropy is not None:
            metrics["token_accuracy"] = scores.correct.sum()
            metrics["entropy"] = scores.entropy.sum()
        return LossOutput(cross_entropy_sum(scores.logps), batch.num_scored, metrics)
