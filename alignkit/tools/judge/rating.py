"""Score several models' answers to the same prompts, for `alignkit compare --judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from statistics import fmean
from typing import NamedTuple

import torch

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.defects import DefectError
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import sft_sides
from alignkit.errors import AlignkitError
from alignkit.models.text_format import TextFormat, TextKind
from alignkit.tools.generate.prompts import Question, with_system
from alignkit.tools.judge.scoring import (
    Flags,
    Scorer,
    batches,
    find_judge,
    load_scorer,
    row_encoder,
)
from alignkit.tools.judge.verdict import Verdict, at_equal_length

_TOKENS = 4096  # of a batch
_LONGEST = 2**20  # nothing is cut or dropped; the judge's own limit is told where it is met
_FLAGS = Flags("--judge", "--judge_reference", "--judge_beta")
# An answer is rated as it stands: empty, running on, or like another model's.
_AS_IT_STANDS = Policies(
    empty_answers="keep",
    roles_inside_answer="keep",
    templated_text="keep",
    boundary="keep",
    too_long="error",
)


class Rating(NamedTuple):
    """Hold how a model's answers were rated, beside the first model's.

    Example:
        >>> answers = {"base": ["Yes.", "No."], "dpo": ["Yes!", "No!"]}
        >>> rating = rate({"base": [0.0, 1.0], "dpo": [1.0, 1.5]}, answers)
        >>> rating["dpo"].score, rating["dpo"].wins
        (1.25, 1.0)

    Attributes:
        score: The mean score.
        wins: The share of prompts where its answer has the higher score; a tie is a half. It and
            what follows is NaN for the first model itself.
        wins_error: The standard error of ``wins``.
        equal_length: That share at answers of equal length, see `at_equal_length`.
        equal_length_error: Its standard error.
    """

    score: float
    wins: float
    wins_error: float
    equal_length: float
    equal_length_error: float


class Judge:
    """Score answers by a reward model or by DPO's implicit reward.

    Args:
        model: As in `alignkit.tools.judge.scoring.find_judge`.
        reference: As there.
        beta: As there.

    Raises:
        AlignkitError: As `find_judge`; nothing is loaded yet.
    """

    def __init__(self, model: str, reference: str | None = None, beta: float | None = None) -> None:
        self._found = find_judge(model, reference, beta, _FLAGS)

    @torch.no_grad()
    def scores(
        self,
        questions: Sequence[Question],
        answers: Mapping[str, Sequence[str]],
        device: torch.device,
    ) -> dict[str, list[float]]:
        """Return the score of each model's answer to each question.

        Args:
            questions: What the human says, as text or messages.
            answers: From a model's name to its answers, one a question.
            device: Where the judge computes.

        Raises:
            AlignkitError: The judge cannot be loaded, or an answer cannot be read by it.
        """
        scorer, tokenizer = load_scorer(self._found, device)

        def sources(kind: TextKind) -> list[Source]:
            asked = TextFormat(kind, max_length=0)
            prompts = [with_system(question, asked) for question in questions]
            return [_source(name, prompts, given) for name, given in answers.items()]

        encoder = row_encoder(
            sources("boundary"),
            tokenizer,
            self._found.place,
            sft_sides,
            max_length=_LONGEST,
            policies=_AS_IT_STANDS,
        )
        try:
            return {
                source.name: _scored(source, encoder, scorer)
                for source in sources(encoder.prompt_format)
            }
        except DefectError as defect:  # nobody chose these policies
            raise AlignkitError(f"--judge: {defect.told}") from None


def _source(name: str, prompts: Sequence[Question], answers: Sequence[str]) -> Source:
    """Return a model's answers as rows, whose numbers are those of the prompts."""
    rows = [
        {"prompt": prompt, "completion": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Source(name, "", lambda: iter(enumerate(rows, start=1)))


def _scored(source: Source, encoder: DialogueEncoder, scorer: Scorer) -> list[float]:
    found: dict[int, float] = {}
    for drafts in batches(encoder.drafts(source, Tally()), encoder, _TOKENS):
        scored = scorer([encoder.example(draft) for draft in drafts])
        found |= {draft.line: score for draft, (score,) in zip(drafts, scored, strict=True)}
    wanted = [line for line, _ in source.rows()]
    for line in wanted:
        if line not in found:
            raise AlignkitError(f"--judge: cannot read {source.name}'s answer to prompt {line}")
    return [found[line] for line in wanted]


def rate(
    scores: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[str]]
) -> dict[str, Rating]:
    """Return the rating of each model beside the first; lengths are counted in characters.

    Args:
        scores: From a model's name to the scores of its answers.
        answers: From a model's name to its answers.
    """
    first = next(iter(scores), "")
    ratings = {}
    for name, own in scores.items():
        if name == first:
            ratings[name] = Rating(fmean(own), nan, nan, nan, nan)
            continue
        margins = [a - b for a, b in zip(own, scores[first], strict=True)]
        longer = [len(a) - len(b) for a, b in zip(answers[name], answers[first], strict=True)]
        verdict = Verdict.of(margins)
        ratings[name] = Rating(
            fmean(own), verdict.accuracy, verdict.error, *at_equal_length(margins, longer)
        )
    return ratings


def share(value: float, error: float) -> str:
    """Return a share with its standard error, which a single prompt does not give."""
    return f"{value:.1%}" if isnan(error) else f"{value:.1%} ± {error:.1%}"
