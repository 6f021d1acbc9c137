"""Score several models' answers to the same prompts, for `alignkit compare --judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from alignkit.data.read.rows import Source
from alignkit.data.text.defects import DefectError
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import sft_sides
from alignkit.errors import AlignkitError
from alignkit.tools.judge.scoring import Flags, batches, find_judge, load_scorer, row_encoder
from alignkit.tools.judge.verdict import Verdict, at_equal_length

_TOKENS = 4096  # of a batch
_LONGEST = 2**20  # answers are as long as they are; the judge's own limit speaks for itself
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
        wins: The share of prompts where its answer has the higher score; a tie is a half.
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
        model: As in `alignkit.tools.judge.scoring.load_scorer`.
        reference: As there.
        beta: As there.

    Raises:
        AlignkitError: As `find_judge`; nothing is loaded yet.
    """

    def __init__(self, model: str, reference: str | None = None, beta: float | None = None) -> None:
        self._given = model, reference, beta
        self._place, _ = find_judge(*self._given, _FLAGS)

    @torch.no_grad()
    def scores(
        self,
        questions: Sequence[Any],
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
        scorer, tokenizer = load_scorer(*self._given, device, _FLAGS)
        rows = [
            {"prompt": question, "completion": answer}
            for given in answers.values()
            for question, answer in zip(questions, given, strict=True)
        ]
        source = Source("answers", "", lambda: iter(enumerate(rows, start=1)))
        encoder = row_encoder(
            [source],
            tokenizer,
            self._place,
            sft_sides,
            max_length=_LONGEST,
            policies=_AS_IT_STANDS,
        )
        found: dict[int, float] = {}
        try:
            for drafts in batches(encoder.drafts(source, Tally()), encoder, _TOKENS):
                scored = scorer([encoder.example(draft) for draft in drafts])
                found |= {draft.line: score for draft, (score,) in zip(drafts, scored, strict=True)}
        except DefectError as defect:  # nobody chose these policies
            raise AlignkitError(f"--judge: {defect.told}") from None
        if len(found) < len(rows):
            row = rows[min(set(range(1, len(rows) + 1)) - found.keys()) - 1]
            raise AlignkitError(f"--judge: cannot read the answer {str(row['completion'])[:60]!r}")
        values = iter(found[line] for line in sorted(found))
        return {name: [next(values) for _ in given] for name, given in answers.items()}


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
        margins = [a - b for a, b in zip(own, scores[first], strict=True)]
        longer = [len(a) - len(b) for a, b in zip(answers[name], answers[first], strict=True)]
        verdict = Verdict.of(margins)
        mean = sum(own) / len(own)
        ratings[name] = Rating(
            mean, verdict.accuracy, verdict.error, *at_equal_length(margins, longer)
        )
    return ratings
