"""Draw ``docs/packed_row.svg``: one packed row, and which of its tokens sees which.

    python docs/packed_row.py

The batch is `collate`'s and the squares are the engine's own mask, so the picture shows what a
model computes. A token is a word here.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path

import torch

from alignkit.batch import Example, PackedBatch, collate
from alignkit.engine.segments import example_mask, row_segments

PICTURE = Path(__file__).with_suffix(".svg")
END = "⏎"
PROMPTS = {
    "How do I keep bread fresh ?": (
        "Wrap it in paper .",
        "Slice and freeze it .",
        "I cannot say .",
    ),
    "Name a fruit .": ("A ripe fig .", "An oak ."),
}
"""Each prompt with the answers that share it."""

_CELL = 13
_LEFT, _TOP = 96, 72
_PROMPT = "#5b6572"
_ANSWERS = ("#1b7f5c", "#c2621b", "#6b4fc0")
_HIDDEN = "#eef1f4"
_INK = "#1f2933"
_FONTS = "system-ui, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"


def make() -> tuple[PackedBatch, list[str]]:
    """Return the batch, and the word that each of its tokens stands for."""
    names: list[str] = []

    def ids(text: str) -> list[int]:
        names.extend(word for word in text.split() if word not in names)
        return [names.index(word) for word in text.split()]

    examples = [
        Example(prompt=ids(prompt), responses=[ids(f"{answer} {END}") for answer in answers])
        for prompt, answers in PROMPTS.items()
    ]
    batch = collate(examples)
    return batch, [names[index] for index in batch.input_ids.tolist()]


def draw(batch: PackedBatch, words: list[str]) -> str:
    """Return the picture as SVG."""
    colors = [(_PROMPT, *_ANSWERS)[k] for k in row_segments(batch.spans).tolist()]
    sees_TT = torch.block_diag(*(example_mask(span).float() for span in batch.spans)).bool()
    squares: dict[str, list[str]] = defaultdict(list)
    for row in range(batch.num_tokens):
        for column in range(row + 1):
            fill = colors[column] if sees_TT[row, column] else _HIDDEN
            x, y = _LEFT + column * _CELL + 2, _TOP + row * _CELL + 2
            squares[fill].append(f"M{x} {y}h9v9h-9z")
    width, height = (edge + _CELL * batch.num_tokens + 20 for edge in (_LEFT, _TOP))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{_FONTS}" font-size="10.5">',
        "<title>A packed row and its attention mask</title>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>',
        *(
            f'<path fill="{fill}" stroke="{fill}" stroke-width="3" stroke-linejoin="round" '
            f'd="{"".join(paths)}"/>'
            for fill, paths in squares.items()
        ),
        *_labels(batch, words, colors),
        *_legend(batch),
        "</svg>\n",
    ]
    return "\n".join(lines)


def _labels(batch: PackedBatch, words: list[str], colors: list[str]) -> list[str]:
    """Return the words and positions beside the rows, and the words above the columns."""
    lines = []
    for place, (word, color) in enumerate(zip(words, colors, strict=True)):
        style = f'fill="{color}"' + ' font-weight="700"' * (color != _PROMPT)
        middle = place * _CELL + _CELL / 2 + 3.5
        lines += [
            f'<text x="{_LEFT - 26}" y="{_TOP + middle:g}" text-anchor="end" {style}>'
            f"{escape(word)}</text>",
            f'<text x="{_LEFT - 6}" y="{_TOP + middle:g}" text-anchor="end" font-size="8.5" '
            f'fill="#8a94a0">{batch.position_ids[place]}</text>',
            f'<text transform="translate({_LEFT + middle:g} {_TOP - 7}) rotate(-90)" {style}>'
            f"{escape(word)}</text>",
        ]
    return lines


def _legend(batch: PackedBatch) -> list[str]:
    """Return what stands where no token sees a later one."""
    repeated = sum(span.prompt + length for span in batch.spans for length in span.responses)
    padded = batch.num_responses * batch.longest
    told = [
        (34, 'font-size="15" font-weight="700"', _INK, "One row, every answer, no padding"),
        (52, "", _INK, "A row of the grid is a token; its squares are what it sees."),
        (80, "", _PROMPT, "■ a prompt, computed once for all its answers"),
        *(
            (80 + 16 * k, "", color, f"■ answer {k}: sees its prompt and itself, no other answer")
            for k, color in enumerate(_ANSWERS, 1)
        ),
        (144, "", _INK, "bold: the tokens that are scored; grey: positions"),
        (172, 'font-weight="700"', _INK, f"{batch.num_tokens} tokens"),
        (188, "", _INK, f"{repeated} with each prompt repeated, {padded} padded as well"),
    ]
    right = _LEFT + _CELL * batch.num_tokens
    return [
        f'<text x="{right}" y="{_TOP - 14 + y}" text-anchor="end" fill="{color}" {style}>'
        f"{escape(text)}</text>"
        for y, style, color, text in told
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(*make()), encoding="utf-8")
