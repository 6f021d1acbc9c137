"""Run ``alignkit judge``, which scores the answers of a file and ranks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.choose import choose_format
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.rows import BadRow, Source
from alignkit.data.read.sources import find_splits
from alignkit.data.text.defects import DefectError
from alignkit.data.text.policies import Tally
from alignkit.data.text.ranked import SAMPLED
from alignkit.data.text.recognise import check_columns
from alignkit.data.text.shapes import preference_sides
from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import active_adapter, adapters_disabled
from alignkit.models.checkpoint import load_policy, policy_format, read_checkpoint
from alignkit.models.find import find_checkpoint
from alignkit.models.reward import holds_reward, is_classifier, load_classifier, rewards
from alignkit.models.text_format import PromptChoice
from alignkit.models.tokenizer import refuse_other_tokens
from alignkit.utils.atomic import check_output, write_atomically

_BETA = 0.1
_LINES_SHOWN = 5

Scorer = Callable[[Sequence[Example]], list[list[float]]]
"""Returns the score of each answer of each example."""


@dataclass(frozen=True)
class Verdict:
    """Hold how a file's answers were scored.

    Example:
        >>> Verdict(rows=2, accuracy=0.5, error=0.5, margin=0.1).accuracy
        0.5

    Attributes:
        rows: How many rows were scored.
        accuracy: The share whose first answer has a higher score than their last; a tie is a half.
        error: Its standard error; NaN for one row.
        margin: The mean difference of the two scores.
    """

    rows: int
    accuracy: float
    error: float
    margin: float


@torch.no_grad()
def judge(
    path: str,
    *,
    model: str,
    reference: str | None = None,
    beta: float | None = None,
    output: str | None = None,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    max_length: int = 512,
    prompt_format: PromptChoice = "auto",
    tokens_per_batch: int = 4096,
) -> Verdict:
    """Score the answers of a file by a reward model, or by DPO's implicit reward, and rank them.

    Args:
        path: Pairs, ranked answers or what ``alignkit sample`` wrote: a file, a directory or a Hub
            id, as the data modules take it.
        model: A reward model (a checkpoint, a run's folder, or what ``export --to reward`` wrote),
            or a policy, whose implicit reward is β (log π(y|x) − log π_ref(y|x)).
        reference: π_ref, as ``model``; by default the policy without its adapters.
        beta: β, the scale of the implicit reward, 0.1 by default.
        output: A JSON-lines file for the rows: ``prompt``, ``responses`` from the best to the
            worst, and their ``scores``, which the data modules read.
        split: Judge this split alone; default: all.
        columns: The rows' columns by the names that are read, as ``data.columns`` has them.
        max_length: Most tokens of a prompt with one answer.
        prompt_format: How dialogues become text; ``auto`` does as the model was trained, or as the
            data modules choose.
        tokens_per_batch: Most tokens in one batch.

    Returns:
        The verdict on the order in which the file had the answers.

    Raises:
        AlignkitError: Nothing can be read there, or the models do not fit.
    """
    _check_numbers(beta, tokens_per_batch)
    written = check_output(output, "--output")
    offered = find_splits(path)
    if split is not None and split not in offered:
        raise AlignkitError(f"--split {split}: {path} has {', '.join(offered)}")
    sources = [s for name in offered if split in (None, name) for s in offered[name]]
    model = find_checkpoint(model)
    columns = columns or _sampled(sources)
    scorer, tokenizer = _scorer(model, reference, beta)
    encoder = _encoder(sources, tokenizer, model, prompt_format, max_length, columns)
    lines: list[str] = []
    margins: list[float] = []
    dropped: list[int] = []
    try:
        for drafts in _batches(_drafts(sources, encoder, dropped), encoder, tokens_per_batch):
            scored = scorer([encoder.example(draft) for draft in drafts])
            for draft, scores in zip(drafts, scored, strict=True):
                lines.append(json.dumps(ranked_row(draft, scores), ensure_ascii=False))
                margins.append(scores[0] - scores[-1])
    except DefectError as defect:  # this command has no policies
        raise AlignkitError(defect.told) from None
    finally:  # also what was scored before a signal
        if written is not None and lines:
            write_atomically(written, "".join(f"{line}\n" for line in lines))
    if not margins:
        raise AlignkitError(f"{path}: has no row to judge{_dropped(dropped)}")
    verdict = _verdict(torch.tensor(margins, dtype=torch.float64))
    error = f" (± {verdict.error:.1%})" if verdict.rows > 1 else ""
    rows = f"{verdict.rows:,} row{'s' if verdict.rows > 1 else ''}{_dropped(dropped)}"
    print(
        f"{path}: {rows}, first answer above the last in {verdict.accuracy:.1%}{error}, by "
        f"{verdict.margin:.4g} on average"
    )
    return verdict


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `judge`, whose path is positional."""
    parser.add_argument("path", type=str, help="Pairs, ranked or sampled answers.")
    parser.add_function_arguments(judge, skip={"path"})


def ranked_row(draft: DraftExample, scores: Sequence[float]) -> dict[str, Any]:
    """Return a row with its answers from the best to the worst, and their scores."""
    said = draft.dialogue
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if said.messages is None:
        prompt: Any = said.prompt
        answers: list[str] = list(said.answers)
    else:
        prompt = [{"role": each.role, "content": each.content} for each in said.messages]
        answers = [each.content for each in said.said()]
    return {
        "prompt": prompt,
        "responses": [answers[index] for index in order],
        "scores": [scores[index] for index in order],
    }


def _scorer(
    model: str, reference: str | None, beta: float | None
) -> tuple[Scorer, PreTrainedTokenizerBase]:
    """Return what scores answers, and the tokenizer that it reads them by."""
    is_checkpoint = model.endswith(".ckpt")
    if is_classifier(model) or (is_checkpoint and holds_reward(read_checkpoint(model))):
        for flag, value in (("--reference", reference), ("--beta", beta)):
            if value is not None:
                raise AlignkitError(f"{flag}: {model} is a reward model, which needs none")
        if not is_checkpoint:
            return load_classifier(model)
        headed, tokenizer = load_policy(model, reward=True)
        padding = int(tokenizer.pad_token_id)
        return lambda examples: _split(rewards(headed, collate(examples), padding), examples), (
            tokenizer
        )
    policy, tokenizer = load_policy(model)
    if reference is None and active_adapter(policy) is None:
        raise AlignkitError(
            f"--model {model}: is a whole model, whose implicit reward needs --reference"
        )
    other = policy
    if reference is not None:
        other, theirs = load_policy(reference, argument="reference")
        try:
            refuse_other_tokens(theirs, tokenizer, model)
        except AlignkitError as error:
            raise AlignkitError(f"--reference {reference}: {error}") from None
    scale = _BETA if beta is None else beta

    def implicit(examples: Sequence[Example]) -> list[list[float]]:
        batch = collate(examples)
        ours = response_sums(score(policy, batch), batch)
        with adapters_disabled(policy) if other is policy else nullcontext():
            theirs = response_sums(score(other, batch), batch)
        return _split(scale * (ours - theirs), examples)

    return implicit, tokenizer


def _encoder(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    prompt_format: PromptChoice,
    max_length: int,
    columns: dict[str, str] | None,
) -> DialogueEncoder:
    """Return the encoder of the rows, in the format that the model was trained with."""
    names = check_columns(columns)
    trained = policy_format(model) if Path(model).exists() else None
    if prompt_format == "auto" and trained is not None and trained.prompt_format != "text":
        prompt_format = trained.prompt_format
    if prompt_format == "auto":
        prompt_format = choose_format(tokenizer, sources, preference_sides, names).prompt_format
    return DialogueEncoder(
        tokenizer,
        preference_sides,
        max_length=max_length,
        prompt_format=prompt_format,
        columns=names,
    )


def _drafts(
    sources: Sequence[Source], encoder: DialogueEncoder, dropped: list[int]
) -> Iterator[DraftExample]:
    """Yield the rows, and add the lines of those that a policy drops to ``dropped``."""
    for source in sources:
        tally = Tally(lines_kept=None)
        kept = set()
        for draft in encoder.drafts(source, tally):
            kept.add(draft.line)
            yield draft
        dropped += sorted(set(tally.lines.get("rows", ())) - kept)


def _sampled(sources: Sequence[Source]) -> dict[str, str] | None:
    """Return how the rows of ``alignkit sample`` are read, ``None`` for rows of others."""
    first = next((row for source in sources for _, row in source.rows()), {})
    is_sampled = not isinstance(first, BadRow) and SAMPLED in first
    return {"responses": SAMPLED} if is_sampled else None


def _batches(
    drafts: Iterator[DraftExample], encoder: DialogueEncoder, most: int
) -> Iterator[list[DraftExample]]:
    """Yield the rows in batches of so many tokens at most, or of one row."""
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


def _dropped(lines: Sequence[int]) -> str:
    """Return what a sentence says about dropped rows, empty where there are none."""
    if not lines:
        return ""
    listed = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", …" if lines[_LINES_SHOWN:] else "")
    return f", dropped {len(lines):,} (line {listed}; alignkit audit says why)"


def _check_numbers(beta: float | None, tokens_per_batch: int) -> None:
    if beta is not None and not 0 < beta < float("inf"):
        raise AlignkitError(f"--beta {beta}: must be above 0")
    if tokens_per_batch < 1:
        raise AlignkitError(f"--tokens_per_batch {tokens_per_batch}: must be 1 or more")


def _split(scores_R: Tensor, examples: Sequence[Example]) -> list[list[float]]:
    counts = [len(example.responses) for example in examples]
    return [part.tolist() for part in torch.split(scores_R, counts)]


def _verdict(margins: Tensor) -> Verdict:
    credit = (margins.sign() + 1) / 2
    error = (credit.var() / len(credit)).sqrt().item() if len(credit) > 1 else float("nan")
    return Verdict(len(credit), credit.mean().item(), error, margins.mean().item())
