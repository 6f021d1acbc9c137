"""Write a comparison as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.gauges import Gauges
from alignkit.tools.judge.rating import Rating, share
from alignkit.tools.moved import Piece
from alignkit.tools.page import write_page

_FULL = 2.0  # nats at which a colour is full
_MORE, _LESS = "0, 114, 178", "213, 94, 0"  # Okabe and Ito's blue and vermilion


def comparison_page(
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answer]],
    moved: Mapping[str, Sequence[Sequence[Piece]]],
    failures: Mapping[str, str],
    *,
    scores: Mapping[str, Sequence[float]] | None = None,
    ratings: Mapping[str, Rating] | None = None,
) -> str:
    """Return the page's HTML: gauges of each model, and the answers to each prompt side by side.

    Args:
        prompts: The questions.
        answers: From a model's name to its answers.
        moved: From a model's name to the tokens of each answer, as its adapter moved them.
        failures: From a model's name to why it gave none.
        scores: From a model's name to a judge's score of each answer.
        ratings: From a model's name to how its answers compare with the first model's.
    """
    scores = scores or {}
    told = "".join(
        f"<p><b>{escape(name)}</b> failed: {escape(why)}</p>" for name, why in failures.items()
    )
    parts = [
        f"<h2>{index}. {escape(prompt)}</h2><div class=columns>"
        + "".join(
            f"<section><h3>{escape(name)}{_score(scores, name, index - 1)}</h3>"
            f"{_answer(given[index - 1], moved[name][index - 1])}</section>"
            for name, given in answers.items()
        )
        + "</div>"
        for index, prompt in enumerate(prompts, start=1)
    ]
    legend = (
        f'<p class=quiet>In <span style="background: rgba({_MORE}, .4)">blue</span> are tokens '
        f'that the adapter made likelier than its base has them, in <span style="background: '
        f'rgba({_LESS}, .4)">orange</span> those that it made less likely; full colour is a factor '
        f"of e<sup>{_FULL:g}</sup>. Point at a token for its number.</p>"
    )
    return write_page(
        "Answers side by side", _gauges(answers, ratings or {}) + told + legend + "".join(parts)
    )


def _gauges(answers: Mapping[str, Sequence[Answer]], ratings: Mapping[str, Rating]) -> str:
    first = next(iter(ratings), "")
    beside = (f"above {escape(first)}", "at equal length") if len(ratings) > 1 else ()
    judged = ("mean score", *beside) if ratings else ()
    head = "<th>model</th>" + "".join(
        f"<th class=n>{name}</th>"
        for name in (
            "mean tokens",
            "ended by itself",
            "empty",
            "repeated 3-grams",
            "runs on into the human's turn",
            *judged,
        )
    )
    rows = ""
    for name, given in answers.items():
        gauges = Gauges.of(given)
        values = [
            f"{gauges.tokens:.1f}",
            f"{gauges.ended:.0%}",
            f"{gauges.empty:.0%}",
            f"{gauges.repetition:.1%}",
            f"{gauges.run_on:.0%}",
            *(
                _rated(ratings[name], name != first)[: len(judged)]
                if name in ratings
                else [""] * len(judged)
            ),
        ]
        cells = "".join(f"<td class=n>{value}</td>" for value in values)
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def _rated(rating: Rating, beside_another: bool) -> list[str]:
    if not beside_another:
        return [f"{rating.score:.3g}", "", ""]
    return [
        f"{rating.score:.3g}",
        share(rating.wins, rating.wins_error),
        share(rating.equal_length, rating.equal_length_error),
    ]


def _score(scores: Mapping[str, Sequence[float]], name: str, index: int) -> str:
    """Return what a heading says of an answer's score; one above all others is marked."""
    if name not in scores:
        return ""
    own = scores[name][index]
    others = [each[index] for other, each in scores.items() if other != name]
    best = " ★" if others and own > max(others) else ""
    return f' <span class="quiet score">{own:.3g}{best}</span>'


def _answer(answer: Answer, moved: Sequence[Piece]) -> str:
    kind = "answer" if answer.ended else "answer cut"
    return f'<div class="{kind}">{"".join(map(_token, moved)) or "<i>nothing</i>"}</div>'


def _token(piece: Piece) -> str:
    text, ratio = piece
    if ratio is None:
        return escape(text)
    colour = _MORE if ratio > 0 else _LESS
    strength = min(abs(ratio) / _FULL, 1.0) * 0.7
    style = f"background: rgba({colour}, {strength:.2f})"
    return f'<span title="{ratio:+.2f}" style="{style}">{escape(text)}</span>'
