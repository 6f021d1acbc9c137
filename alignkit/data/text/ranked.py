"""Put ranked answers in the order of their scores, whatever names their fields have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import HARMLESS

SCORES = ("scores", "ratings", "rewards")
"""Columns with a number for each answer, the higher the better."""

RANKS = ("ranks", "rankings")
"""Columns with a number for each answer, the lower the better."""

ANSWERS = ("responses", "completions", "answers", "generations")
"""Columns with several answers to a prompt."""

SAMPLED = "candidates"
"""Column of answers that ``alignkit sample`` drew, which nobody has ranked yet."""

_TEXTS = ("text", "response", "content", "answer", "completion", "output", "generation", "value")
_SCORE = ("score", "rating", "overall_score", "reward", "quality", "pm_score")
_RANK = ("rank", "ranking")


def has_scores(answers: Any) -> bool:
    """Tell whether answers carry scores or ranks of their own, one at least."""
    return isinstance(answers, list) and _own_numbers(answers) is not None


def best_first(answers: Any, scores: Any = None, *, lower_is_better: bool = False) -> Any:
    """Return answers in the order of their scores, one of each score.

    Where two answers have the same score nobody prefers one, and the first is taken. Where all
    have, the first is there twice, which is found as a pair of identical answers.

    Args:
        answers: Texts, messages, or ``{"text": …, "score": …}`` by any of the names above.
            Without scores they are in order already.
        scores: A number for each, where they stand in a column of their own.
        lower_is_better: Whether these are ranks.

    Example:
        >>> best_first([{"text": "5", "score": 1}, {"text": "4", "score": 9.5}])
        ['4', '5']

    Raises:
        RowError: A score is missing or no number.
    """
    if not isinstance(answers, list):
        return answers
    ordered = _in_order(answers, scores, lower_is_better=lower_is_better)
    if len(ordered) < 2 or ordered[0][0] is None:
        return [answer for _, answer in ordered]
    first_of: dict[float | None, Any] = {}
    for number, answer in ordered:
        first_of.setdefault(number, answer)
    return list(first_of.values()) if len(first_of) > 1 else [*first_of.values()] * 2


def without_scores(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose answers have scores or ranks as one of all its answers, the best first.

    Answers of one score stay in their order. Whatever has no such answers is the row itself.

    Example:
        >>> without_scores({"prompt": "2 + 2?", "answers": ["5", "4", "four"], "ranks": [2, 1, 1]})
        {'prompt': '2 + 2?', 'responses': ['4', 'four', '5']}

    Raises:
        RowError: As `best_first`.
    """
    answers = [name for name in ANSWERS if isinstance(row.get(name), list)]
    numbers = [name for name in (*SCORES, *RANKS) if row.get(name) is not None]
    if len(answers) != 1 or len(numbers) > 1 or not row.keys().isdisjoint(("chosen", "rejected")):
        return row
    (name,) = answers
    if not numbers and not has_scores(row[name]):
        return row
    scores = row[numbers[0]] if numbers else None
    ordered = _in_order(row[name], scores, lower_is_better=bool(numbers) and numbers[0] in RANKS)
    others = {key: value for key, value in row.items() if key not in (name, *numbers)}
    return {**others, "responses": [answer for _, answer in ordered]}


def _in_order(
    answers: list[Any], scores: Any, *, lower_is_better: bool
) -> list[tuple[float | None, Any]]:
    """Return each answer with its score, the best first; ``None`` where none has one."""
    if scores is None:
        numbers = _own_numbers(answers)
        if numbers is None:
            _refuse_others(answers)
            return [(None, _text(each)) for each in answers]
    else:
        if not isinstance(scores, list) or len(scores) != len(answers):
            raise RowError("the row has not one score for each of its `responses`")
        numbers = [_number(each) * (-1 if lower_is_better else 1) for each in scores]
    order = sorted(range(len(answers)), key=lambda index: -numbers[index])
    return [(numbers[index], _text(answers[index])) for index in order]


def _refuse_others(answers: Sequence[Any]) -> None:
    """Refuse answers with numbers that may be scores by a name that is not known."""
    for each in answers:
        for name, value in each.items() if isinstance(each, Mapping) else ():
            if isinstance(value, int | float) and name not in HARMLESS and "id" not in name:
                raise RowError(
                    f"the answers have `{name}`, which is no known score, so that nobody knows "
                    "which is better; call it `score`, or `rank` where the lower is better"
                )


def _own_numbers(answers: Sequence[Any]) -> list[float] | None:
    """Return the numbers that answers carry, the higher the better; ``None`` where none does."""
    for name in (*_SCORE, *_RANK):
        if any(isinstance(each, Mapping) and each.get(name) is not None for each in answers):
            sign = -1 if name in _RANK else 1
            return [
                sign * _number(each.get(name) if isinstance(each, Mapping) else None)
                for each in answers
            ]
    return None


def _text(answer: Any) -> Any:
    """Return an answer's text; a message, or what is text already, stays."""
    if not isinstance(answer, Mapping) or answer.get("role") or answer.get("from"):
        return answer
    found = [name for name in _TEXTS if isinstance(answer.get(name), str)]
    if len(found) != 1:
        told = " and ".join(f"`{name}`" for name in found) or "none"
        raise RowError(f"an answer of `responses` must hold one text, as `text` (it has {told})")
    return answer[found[0]]


def _number(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RowError(f"the score {str(value)[:20]!r} of an answer is no number")
    return number
