"""Write a comparison as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from alignkit.tools.generate.answer import Answer
from alignkit.tools.moved import Piece
from alignkit.tools.page import write_page

_FULL = 2.0  # nats at which a colour is full
_MORE, _LESS = "0, 114, 178", "213, 94, 0"  # Okabe and Ito's blue and vermilion


def comparison_page(
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answer]],
    moved: Mapping[str, Sequence[Sequence[Piece]]],
    failures: Mapping[str, str],
) -> str:
    """Return the page's HTML: gauges of each model, and the answers to each prompt side by side.

    Args:
        prompts: The questions.
        answers: From a model's name to its answers.
        moved: From a model's name to the tokens of each answer, as its adapter moved them.
        failures: From a model's name to why it gave none.
    """
    told = "".join(
        f"<p><b>{escape(name)}</b> failed: {escape(why)}</p>" for name, why in failures.items()
    )
    parts = [
        f"<h2>{index}. {escape(prompt)}</h2><div class=columns>"
        + "".join(
            f"<section><h3>{escape(name)}</h3>{_answer(given[index - 1], moved[name][index - 1])}"
            "</section>"
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
    return write_page("Answers side by side", _gauges(answers) + told + legend + "".join(parts))


def _gauges(answers: Mapping[str, Sequence[Answer]]) -> str:
    head = "<th>model</th>" + "".join(
        f"<th class=n>{name}</th>"
        for name in ("mean tokens", "ended by itself", "repeated 3-grams", "Human: in the answer")
    )
    rows = ""
    for name, given in answers.items():
        count = max(len(given), 1)
        values = (
            f"{sum(len(each.ids) for each in given) / count:.1f}",
            f"{sum(each.ended for each in given) / count:.0%}",
            f"{sum(each.repetition for each in given) / count:.1%}",
            f"{sum('Human:' in each.text for each in given) / count:.0%}",
        )
        cells = "".join(f"<td class=n>{value}</td>" for value in values)
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


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
