"""Load what scores answers: a reward model, or a policy by DPO's implicit reward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.choose import choose_format
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies
from alignkit.data.text.shapes import Sides
from alignkit.engine import Example, collate, response_sums, score
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
        place: A reward model, or a policy, whose implicit reward is β (log π − log π_ref).
        is_reward: Whether it is a reward model.
        reference: π_ref; ``None`` for the policy without its adapters.
        beta: β; ``None`` for 0.1.
        flags: What these are called in messages.
    """

    place: str
    is_reward: bool
    reference: str | None = None
    beta: float | None = None
    flags: Flags = FLAGS


def find_judge(
    model: str, reference: str | None, beta: float | None, flags: Flags = FLAGS
) -> FoundJudge:
    """Find a judge, and check what can be checked before its weights are loaded.

    Args:
        model: See `FoundJudge`; a run's folder stands for its newest checkpoint.
        reference: See `FoundJudge`; ``None`` for what a run of DPO or KTO was trained against.
        beta: See `FoundJudge`; ``None`` for that of such a run.
        flags: See `FoundJudge`.

    Raises:
        AlignkitError: It is missing or unreadable, or the other two do not go with it.
    """
    if beta is not None and not 0 < beta < float("inf"):
        raise AlignkitError(f"{flags.beta} {beta}: must be above 0")
    place = find_checkpoint(model)
    is_reward, is_whole = is_classifier(place), not is_adapter(place)
    with as_argument(flags.model.removeprefix("--"), place):
        read_config(policy_base(place))
        if place.endswith(".ckpt"):
            checkpoint = read_checkpoint(place)
            is_reward = holds_reward(checkpoint)
            is_whole = checkpoint["hyper_parameters"]["lora"] is None
            if not is_reward:
                settings = checkpoint["hyper_parameters"]
                theirs, scale = _trained_with(settings)
                beta = scale if beta is None else beta
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
    return FoundJudge(place, is_reward, reference, beta, flags)


def _trained_with(settings: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Return a run's reference, if it is not the base alone, and its β; nothing of other stages."""
    loss, named = settings.get("loss"), settings.get("reference")
    if not isinstance(loss, Mapping) or "reference" not in settings:
        return None, None
    if named == "none" or ("class_path" in loss and not _reads_reference(loss)):
        return None, None
    if named in (None, "copy"):  # of the policy as it started
        named = settings.get("init_from")
    if named in (None, "base"):  # a whole model has no adapters to take off
        named = settings["base"] if settings.get("lora") is None else None
    values = loss.get("init_args") or loss
    # The rewards of a sum are those of its first term, and WPO's those of the loss inside.
    while inside := (values.get("terms") or [values.get("of")])[0]:
        values = inside.get("init_args") or {}
    return named, values.get("beta")


def _reads_reference(loss: Mapping[str, Any]) -> bool:
    try:
        return bool(PreferenceLoss.from_dict(loss).uses_reference)
    except AlignkitError:  # a loss of one's own, which is not imported here
        return True


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
    model, is_reward, reference, beta, flags = judge
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

    def implicit(examples: Sequence[Example]) -> list[list[float]]:
        batch = collate(examples).to(device)
        ours = response_sums(score(policy, batch), batch)
        with adapters_disabled(policy) if other is policy else nullcontext():
            theirs = response_sums(score(other, batch), batch)
        return _split(scale * (ours - theirs), examples)

    return implicit, tokenizer


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
