"""Load what scores answers: a reward model, or a policy by its loss's or DPO's implicit reward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.choose import choose_format
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies
from alignkit.data.text.shapes import Sides
from alignkit.engine import Example, collate, response_lengths, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import adapters_disabled
from alignkit.models.checkpoint import (
    is_adapter,
    load_policy,
    policy_base,
    policy_format,
    read_checkpoint,
)
from alignkit.models.find import find_checkpoint
from alignkit.models.load import read_config
from alignkit.models.place import as_argument
from alignkit.models.reward import holds_reward, is_classifier, load_classifier, rewards
from alignkit.models.text_format import PromptChoice
from alignkit.models.tokenizer import refuse_other_tokens
from alignkit.objectives.preference import PreferenceLoss
from alignkit.tools.judge.trained import rewards_of, trained_with, weights_of

log = logging.getLogger(__name__)
_BETA = 0.1
_LONGEST = 512  # as the data modules have it

Scorer = Callable[[Sequence[Example]], list[list[float]]]
"""Returns the score of each answer of each example."""


class Flags(NamedTuple):
    """Hold what a judge's settings are called in messages.

    Example:
        >>> Flags().beta
        '--beta'

    Attributes:
        model: The judge.
        reference: Its reference.
        beta: The scale of its implicit reward.
    """

    model: str = "--model"
    reference: str = "--reference"
    beta: str = "--beta"


FLAGS = Flags()


class FoundJudge(NamedTuple):
    """Hold what scores answers before it is loaded.

    Example:
        >>> FoundJudge("runs/dpo/version_0/last.ckpt", is_reward=False).beta is None
        True

    Attributes:
        place: A reward model, or a policy.
        is_reward: Whether it is a reward model.
        reference: π_ref; ``None`` for the policy without its adapters.
        beta: β of the policy's implicit reward, β (log π − log π_ref); ``None`` for 0.1.
        flags: What these are called in messages.
        loss: What the policy was trained by, whose reward takes the place of the implicit one.
    """

    place: str
    is_reward: bool
    reference: str | None = None
    beta: float | None = None
    flags: Flags = FLAGS
    loss: PreferenceLoss | None = None

    @property
    def scores(self) -> str:
        """Tell what the scores are."""
        if self.is_reward:
            return "the reward model's scores"
        if self.loss is not None:
            return f"{type(self.loss).__name__}'s rewards, as in training"
        return f"implicit rewards, {_BETA if self.beta is None else self.beta:g} log π/π_ref"


def find_judge(
    model: str, reference: str | None, beta: float | None, flags: Flags = FLAGS
) -> FoundJudge:
    """Find a judge, and check what can be checked before its weights are loaded.

    Args:
        model: See `FoundJudge`; a run's folder stands for its newest checkpoint.
        reference: See `FoundJudge`; ``None`` for what a run of DPO or KTO was trained against.
        beta: See `FoundJudge`; ``None`` for the reward of such a run's own loss.
        flags: See `FoundJudge`.

    Raises:
        AlignkitError: It is missing or unreadable, or the other two do not go with it.
    """
    if beta is not None and not 0 < beta < float("inf"):
        raise AlignkitError(f"{flags.beta} {beta}: must be above 0")
    place, loss = find_checkpoint(model), None
    is_reward, is_whole = is_classifier(place), not is_adapter(place)
    with as_argument(flags.model.removeprefix("--"), place):
        read_config(policy_base(place))
        if place.endswith(".ckpt"):
            checkpoint = read_checkpoint(place)
            is_reward = holds_reward(checkpoint)
            is_whole = checkpoint["hyper_parameters"]["lora"] is None
            if not is_reward:
                settings = checkpoint["hyper_parameters"]
                theirs, scale, own = trained_with(settings)
                if beta is None:
                    beta, loss = scale, own
                if reference is None and settings.get("reference_every"):
                    log.warning("%s: the run refreshed its reference; the first is taken", place)
                if reference is None and theirs is not None:
                    reference = _there(theirs, flags)
                    log.info("%s %s: as the run was trained", flags.reference, reference)
    if reference is not None:
        with as_argument(flags.reference.removeprefix("--"), reference):
            read_config(policy_base(reference))
    for flag, value in ((flags.reference, reference), (flags.beta, beta)):
        if is_reward and value is not None:
            raise AlignkitError(f"{flag}: {place} is a reward model, which needs none")
    if is_whole and not is_reward and reference is None:
        raise AlignkitError(
            f"{flags.model} {model}: is a whole model, whose implicit reward needs "
            f"{flags.reference}"
        )
    return FoundJudge(place, is_reward, reference, beta, flags, loss)


def _there(reference: str, flags: Flags) -> str:
    """Return a reference that a run names, if it can be read here.

    Raises:
        AlignkitError: It cannot.
    """
    try:
        read_config(policy_base(reference))
    except AlignkitError as error:
        raise AlignkitError(
            f"{flags.reference}: the run was trained against {reference}, which cannot be read "
            f"here ({error}); name it"
        ) from None
    return reference


def load_scorer(judge: FoundJudge, device: torch.device) -> tuple[Scorer, PreTrainedTokenizerBase]:
    """Return what scores answers, and the tokenizer that it reads them by.

    Args:
        judge: What `find_judge` found.
        device: Where it computes.

    Raises:
        AlignkitError: The models cannot be loaded or do not fit.
    """
    scorer, tokenizer = _load(judge, device)
    named = f"{judge.flags.model} {judge.place}"

    def checked(examples: Sequence[Example]) -> list[list[float]]:
        try:
            scores = scorer(examples)
        except AlignkitError as error:
            raise AlignkitError(f"{named}: cannot score an answer: {error}") from None
        if not all(isfinite(score) for row in scores for score in row):
            raise AlignkitError(f"{named}: gives a score that is not finite")
        return scores

    return checked, tokenizer


def _load(judge: FoundJudge, device: torch.device) -> tuple[Scorer, PreTrainedTokenizerBase]:
    model, is_reward, reference, beta, flags, loss = judge
    named = flags.model.removeprefix("--")
    if is_reward:
        if not model.endswith(".ckpt"):
            return load_classifier(model, device)
        headed, tokenizer = load_policy(model, reward=True, argument=named)
        nn.Module.to(headed, device)  # transformers' override is untyped
        padding = int(tokenizer.pad_token_id)

        def explicit(examples: Sequence[Example]) -> list[list[float]]:
            return _split(rewards(headed, collate(examples).to(device), padding), examples)

        return explicit, tokenizer
    policy, tokenizer = load_policy(model, argument=named)
    nn.Module.to(policy, device)
    other = policy
    if reference is not None:
        other, theirs = load_policy(reference, argument=flags.reference.removeprefix("--"))
        nn.Module.to(other, device)
        try:
            refuse_other_tokens(theirs, tokenizer, model)
        except AlignkitError as error:
            raise AlignkitError(f"{flags.reference} {reference}: {error}") from None
    scale = _BETA if beta is None else beta

    def rewarded(examples: Sequence[Example]) -> list[list[float]]:
        batch = collate(examples).to(device)
        weights_N: Tensor | float = 1.0
        if loss is not None and loss.weighs_tokens:
            weights_N = weights_of(loss, batch, examples)
        ours = response_sums(score(policy, batch) * weights_N, batch)
        with adapters_disabled(policy) if other is policy else nullcontext():
            theirs = response_sums(score(other, batch) * weights_N, batch)
        if loss is None:
            return _split(scale * (ours - theirs), examples)
        return _split(rewards_of(loss, ours, theirs, response_lengths(batch)), examples)

    return rewarded, tokenizer


def row_encoder(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    sides: Sides,
    *,
    prompt_format: PromptChoice = "auto",
    max_length: int | None,
    policies: Policies | None = None,
) -> DialogueEncoder:
    """Return the encoder of rows that are judged, in the format that the judge was trained with.

    Args:
        sources: The rows.
        tokenizer: The judge's.
        model: Where the judge lies.
        sides: Reads a row, as in `DialogueEncoder`.
        prompt_format: As in `alignkit.tools.judge.command.judge`.
        max_length: Most tokens of a prompt with one answer; ``None`` for as many as the judge was
            trained with, or 512 where it does not say.
        policies: As in `DialogueEncoder`.
    """
    trained = policy_format(model) if Path(model).exists() else None
    if prompt_format == "auto" and trained is not None and trained.prompt_format != "text":
        prompt_format = trained.prompt_format
    if prompt_format == "auto":
        prompt_format = choose_format(tokenizer, sources, sides).prompt_format
    if max_length is None:
        max_length = (trained and trained.max_length) or _LONGEST
    return DialogueEncoder(
        tokenizer,
        sides,
        max_length=max_length,
        prompt_format=prompt_format,
        policies=policies,
    )


def batches(
    drafts: Iterable[DraftExample], encoder: DialogueEncoder, most: int
) -> Iterator[list[DraftExample]]:
    """Yield rows in batches of so many tokens at most, or of one row."""
    batch: list[DraftExample] = []
    tokens = 0
    for draft in drafts:
        size = encoder.example(draft).num_tokens
        if batch and tokens + size > most:
            yield batch
            batch, tokens = [], 0
        batch.append(draft)
        tokens += size
    if batch:
        yield batch


def _split(scores_R: Tensor, examples: Sequence[Example]) -> list[list[float]]:
    counts = [len(example.responses) for example in examples]
    return [part.tolist() for part in torch.split(scores_R, counts)]
