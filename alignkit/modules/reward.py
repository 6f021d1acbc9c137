"""Train a reward model on pairs or ranked answers.

Shape letters: B prompts, R responses.
"""

from __future__ import annotations

from typing import Any

from alignkit.batch import PackedBatch
from alignkit.engine import response_lengths
from alignkit.models.load import load_tokenizer
from alignkit.models.reward import attach_head, rewards
from alignkit.modules.answers import refuse_other_counts
from alignkit.modules.gauges import RatedPairs
from alignkit.modules.given_loss import given_loss
from alignkit.modules.watch import PairWatch, WatchedModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.ranked import RankedScores
from alignkit.objectives.reward import BradleyTerry


class RewardModule(WatchedModule):
    """Train a scalar head, and adapters below it, to give better answers larger rewards.

    Its data come from a `PreferenceDataModule`. ``alignkit export --to reward`` writes a plain
    sequence-classification model, by which ``alignkit judge`` scores answers.

    Args:
        *args: As in `AlignmentModule`.
        loss: The margin, and how strongly rewards are kept near 0.
        **kwargs: As in `AlignmentModule`.
    """

    rewards = True

    def __init__(
        self,
        *args: Any,
        loss: BradleyTerry = BradleyTerry(),  # noqa: B008 (frozen)
        **kwargs: Any,
    ) -> None:
        loss = given_loss(loss, BradleyTerry, "BradleyTerry()")
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.watch = PairWatch(compares=False, warns=False)
        attach_head(self.model)
        tokenizer = load_tokenizer(self.hparams["tokenizer"] or self.base)
        self.padding = int(tokenizer.pad_token_id)

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the summed loss of the batch's prompts; its weight is their number."""
        refuse_other_counts(batch, self.loss)
        counts = [len(span.responses) for span in batch.spans]
        rewards_R = rewards(self.model, batch, self.padding)
        ranked = RankedScores.from_ranked(rewards_R, response_lengths(batch), counts)
        loss_B = self.loss(ranked)
        ranked = ranked.detached()
        rated = RatedPairs(ranked, ranked, ranked.chosen, ranked.rejected)
        self.watch.add(rated, self.training)
        return LossOutput(loss_B.sum(), len(counts), rated.sums())
