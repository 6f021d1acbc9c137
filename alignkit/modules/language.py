"""Cross-entropy over scored tokens: the objective that language modelling and SFT share."""

from __future__ import annotations

from alignkit.engine import PackedBatch, score_with_stats
from alignkit.modules.base import AlignmentModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.language import cross_entropy_sum


class LanguageModule(AlignmentModule):
    """Mean negative log-likelihood of the scored tokens, in nats; a batch weighs its tokens."""

    perplexity = True

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the summed cross-entropy; in validation, token accuracy and entropy as well."""
        scores = score_with_stats(self.model, batch, stats=not self.training)
        metrics = {}
        if scores.correct is not None and scores.entropy is not None:
            metrics["token_accuracy"] = scores.correct.sum()
            metrics["entropy"] = scores.entropy.sum()
        return LossOutput(cross_entropy_sum(scores.logps), batch.num_scored, metrics)
