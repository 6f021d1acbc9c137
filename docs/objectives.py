"""Write ``docs/objectives.md`` and draw ``docs/objectives.svg``, from the losses themselves.

    python docs/objectives.py

Every loss that ships has a section: what its class says of itself, when to use it, and the flags
that choose it. The picture shows how hard a loss pulls on a pair's two answers. A test compares
both files with what this script makes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.objectives import preference as losses
from alignkit.objectives.preference import PairScores, PreferenceLoss, RankedScores
from alignkit.objectives.reward import BradleyTerry
from alignkit.objectives.unpaired import KTO, UnpairedScores

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOGP, TOKENS = -40.0, 20
"""Of every answer under the reference: its log-probability in nats, and its length."""
REACH = 40.0
"""The margins shown, in nats."""

# When to use each, in the order of the page.
WHEN: dict[str, dict[type, str]] = {
    "A margin against the reference": {
        losses.DPO: "The default, and what the others are measured against. Set "
        "`label_smoothing` to the share of labels you believe wrong.",
        losses.RobustDPO: "Labels are flipped at a rate that you know.",
        losses.EXO: "The policy's choice between the two answers should be as sure as the labels "
        "are, and no surer.",
        losses.NormalizedDPO: "Answers differ in length, and DPO has begun to prefer long ones.",
        losses.DiscoPOP: "An alternative to DPO that gives up on pairs far on the wrong side.",
        losses.WPO: "Pairs were written by other models; those unlike the policy's own answers "
        "count less.",
        losses.LDDPO: "Chosen answers are longer than rejected ones, and length is not what was "
        "preferred. No reference cache, which keeps sums over whole answers.",
    },
    "A margin of a fixed size": {
        losses.IPO: "DPO overfits: margins grow without end on pairs that are already right.",
        losses.Hinge: "Pairs that are right by a margin should pull no more.",
        losses.SPPO: "Each answer's own log-ratio should reach a target, as in self-play.",
    },
    "The chosen answer's likelihood as well": {
        losses.RPO: "Both answers become less likely in training (`val/displacement` rises).",
        losses.DPOP: "As RPO, most where the two answers differ in few tokens.",
        losses.CPO: "As RPO without the memory and time of a reference.",
        losses.ChosenNLL: "A term of `WeightedSum`; alone it is SFT on the chosen answers.",
        losses.WeightedSum: "Several of these at once.",
    },
    "Each answer by itself": {
        losses.NCA: "Chosen rewards should stay above 0, and not only above rejected ones.",
        losses.BCO: "The reward should tell good answers from bad ones across prompts.",
        losses.APOZero: "Chosen answers are better than what the model writes.",
        losses.APODown: "Chosen answers are worse than what the model writes.",
    },
    "Another divergence from the reference": {
        losses.ForwardKLDPO: "The policy should keep all that the reference can say.",
        losses.JensenShannonDPO: "Rewards should be bounded above.",
        losses.AlphaDPO: "Something between DPO and the forward KL.",
    },
    "No reference": {
        losses.SimPO: "Memory or time for a reference is short; needs more care with β and γ.",
        losses.AlphaPO: "SimPO, with a reward shape of its own.",
        losses.ORPO: "Preferences and SFT in one stage, from the base.",
    },
    "Many pairs or answers at once": {
        losses.AOT: "Chosen answers should be better as a distribution, and not pair by pair.",
        losses.UnpairedAOT: "As AOT, where chosen and rejected answers belong to no common prompt.",
        losses.PlackettLuce: "Each prompt has k ranked answers, as `responses` from best to worst "
        "or with `scores`; `PreferenceDataModule` reads both, and a packed row holds it once.",
    },
    "No pairs": {
        KTO: "Each row has one answer and whether it is good: `prompt`, `completion`, `label`.",
    },
    "A reward model": {
        BradleyTerry: "You want a model that scores answers, and not one that gives them. "
        "`alignkit export --to reward` writes it for `AutoModelForSequenceClassification`, and "
        "`alignkit judge` ranks a file's answers by it, or by the implicit reward of a DPO policy.",
    },
}

INTRO = """# Objectives

<!-- Written by docs/objectives.py; edit that, or the losses' own docstrings. -->

Every loss is a frozen dataclass whose fields are its parameters. `--model.loss NAME` chooses it and
`--model.loss.PARAMETER` sets them; in Python it is `DPOModule(base, loss=SimPO(gamma=0.7))`.
[extend.md](extend.md) shows how to write another one. The commands name a model of the Hub and a
file of rows ([Data](data.md#pairs-and-ranked-answers-preferences)); put yours in their place. The
flags behind them go with `alignkit fit --config FILE` as well, where `FILE` trains a `DPOModule`.

Symbols, as in the papers: y_w is the chosen and y_l the rejected answer, |y| an answer's number of
tokens, π the policy, π_ref the reference, σ the logistic function, ε the share of flipped labels.
r(y) = log π(y|x) − log π_ref(y|x) is an answer's log-ratio, β r(y) its reward, and Δ = r(y_w) −
r(y_l) the pair's margin.

![How hard each loss pulls](objectives.svg)

The picture shows the gradient of each loss, at its default parameters, over the margin Δ from −40
to 40 nats. Solid blue is how hard a step raises the chosen answer, −∂L/∂ log π(y_w); dashed red how
hard it lowers the rejected one, ∂L/∂ log π(y_l). Below the thin line an answer moves the other way.
Both answers move apart evenly from −40 nats over 20 tokens; the number at the top right is the
largest pull. Where only blue is seen, both are equal.

The reference is a frozen copy of the policy as it starts. `--model.reference base` takes the base
without adapters, a path takes what lies there, and `--model.reference_every 500` refreshes the copy
every 500 steps (TR-DPO, [arXiv:2404.09656](https://arxiv.org/abs/2404.09656));
`--model.reference_mix 0.6` moves it six tenths of the way.

"""


NOT_DRAWN = {BradleyTerry}
"""Losses of rewards, which are no log-probabilities."""


def shipped() -> list[type]:
    """Return the losses in the order of the page."""
    return [kind for group in WHEN.values() for kind in group]


def said(kind: type) -> tuple[str, str]:
    """Return what a class says of itself, and its list of parameters, as Markdown."""
    text = inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    body, _, rest = text.partition("\nArgs:\n")
    told = re.split(r"\n\n(?:Example|Raises|Attributes):", rest)[0]
    lines = []
    for line in told.splitlines():
        field = re.match(r"    (\w+): (.*)", line)
        lines.append(f"- `{field[1]}`: {field[2]}" if field else f"  {line.strip()}".rstrip())
    body = re.split(r"\n\n(?:Example|Raises|Attributes):", body)[0]
    return body.strip().removeprefix("Compute ").strip(), "\n".join(lines).strip()


def sentence(text: str) -> str:
    """Return text with a capital letter in front, unless it begins with a formula."""
    return text[0].upper() + text[1:] if text[:2].isalpha() or text[1] == " " else text


def command(kind: type) -> str:
    """Return a command that trains by a loss and sets its parameters."""
    if kind is BradleyTerry:
        return _fit(
            "RewardModule", "PreferenceDataModule", "pairs.jsonl", "--model.loss.margin 0.0"
        )
    if kind is KTO:
        return _fit("KTOModule", "UnpairedDataModule", "labelled.jsonl", "--model.loss.beta 0.1")
    if kind is losses.WeightedSum:
        terms = "--model.loss.terms '[DPO, ChosenNLL]' --model.loss.weights '[1, 0.2]'"
        return _dpo(f"--model.loss WeightedSum {terms}")
    if kind is losses.WPO:
        return _dpo("--model.loss WPO --model.loss.of IPO")
    flags = [
        f"--model.loss.{field.name} {field.default}"
        for field in fields(kind)
        if field.default is not MISSING and not isinstance(field.default, bool)
    ]
    return _dpo(" ".join([f"--model.loss {kind.__name__}", *flags]))


def _dpo(flags: str) -> str:
    return f"alignkit dpo --base {BASE} --data pairs.jsonl \\\n  {flags}"


def _fit(module: str, data: str, file: str, flags: str) -> str:
    return (
        f"alignkit fit --model {module} --model.base {BASE} {flags} \\\n"
        f"  --data {data} --data.path {file} --trainer.max_epochs 1"
    )


def page() -> str:
    """Return the page."""
    parts = [INTRO]
    for title, group in WHEN.items():
        parts.append(f"## {title}\n\n")
        for kind, when in group.items():
            body, parameters = said(kind)
            parts.append(f"### {kind.__name__}\n\n{sentence(body)}\n\n")
            parts.append(f"When: {when}\n\n")
            if parameters:
                parts.append(f"{parameters}\n\n")
            parts.append(f"```sh\n{command(kind)}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


def pulls(kind: type) -> tuple[list[float], list[float], list[float]]:
    """Return margins, and how hard a loss raises the chosen and lowers the rejected answer."""
    margins = torch.linspace(-REACH, REACH, 81)
    reference = torch.full_like(margins, LOGP)
    chosen = (reference + margins / 2).requires_grad_()
    rejected = (reference - margins / 2).requires_grad_()
    tokens = torch.full_like(margins, TOKENS, dtype=torch.int64)
    loss = made(kind)
    if isinstance(loss, KTO):
        total = _unpaired(loss, chosen, rejected, reference)
    else:
        total = torch.stack(
            [
                loss(*(_scores(loss, *row) for row in (ours, theirs))).sum()
                for ours, theirs in zip(
                    zip(chosen.split(1), rejected.split(1), tokens.split(1), strict=True),
                    zip(reference.split(1), reference.split(1), tokens.split(1), strict=True),
                    strict=True,
                )
            ]
        ).sum()
    total.backward()
    grads = [
        torch.zeros_like(side) if side.grad is None else side.grad for side in (chosen, rejected)
    ]
    return margins.tolist(), (-grads[0]).tolist(), grads[1].tolist()


def made(kind: Callable[..., Any]) -> Any:
    """Return a loss at its defaults."""
    if kind is losses.WeightedSum:
        return losses.WeightedSum((losses.DPO(), losses.ChosenNLL()), (1.0, 0.2))
    return kind()


def _scores(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor, tokens: Tensor) -> PairScores:
    if loss.ranks:  # a third answer between the two, which does not move
        sums = torch.cat((chosen, torch.tensor([LOGP]), rejected))
        return RankedScores.from_ranked(sums, tokens.expand(3), [3])
    half = torch.tensor([0.5])
    return PairScores(chosen, rejected, tokens, tokens, chosen_weight=half, rejected_weight=half)


def _unpaired(loss: KTO, good: Tensor, bad: Tensor, reference: Tensor) -> Tensor:
    total = torch.zeros(())
    for side, label in ((good, True), (bad, False)):
        labels = torch.full_like(side, label, dtype=torch.bool)
        ours = UnpairedScores(side, reference, labels)
        total = total + loss(ours, UnpairedScores(reference, reference, labels)).sum()
    return total


WIDTH, HEIGHT, COLUMNS = 150, 104, 5
LEFT, TOP, PLOT_W, PLOT_H = 10, 24, 130, 62
BLUE, RED, INK, FAINT = "#1f6fb4", "#c8372d", "#333333", "#bbbbbb"


def panel(kind: type, x: int, y: int) -> str:
    """Return one loss's curves, with their frame at a place."""
    margins, up, down = pulls(kind)
    largest = max(map(abs, (*up, *down))) or 1.0
    low = min(*up, *down, 0.0) / largest
    low = -1.0 if low < -0.05 else 0.0

    def points(values: list[float]) -> str:
        places = [
            (
                LEFT + PLOT_W * (margin + REACH) / (2 * REACH),
                TOP + PLOT_H * (1 - (value / largest - low) / (1 - low)),
            )
            for margin, value in zip(margins, values, strict=True)
        ]
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)

    zero = TOP + PLOT_H * (1 + low / (1 - low))
    middle = LEFT + PLOT_W / 2
    lowered = f'<polyline points="{points(down)}" stroke="{RED}" stroke-dasharray="4 3"/>'
    return "\n".join(
        [
            f'<g transform="translate({x} {y})">',
            f'<text x="{LEFT}" y="14" font-weight="bold">{kind.__name__}</text>',
            f'<path d="M{LEFT} {zero:.1f}h{PLOT_W}M{middle} {TOP}v{PLOT_H}" stroke="{FAINT}"/>',
            *([lowered] if points(down) != points(up) else []),
            f'<polyline points="{points(up)}" stroke="{BLUE}"/>',
            f'<text x="{LEFT + PLOT_W}" y="14" font-size="8" '
            f'text-anchor="end">{largest:.2g}</text>',
            f'<text x="{LEFT}" y="{TOP + PLOT_H + 11}" font-size="8">−40</text>',
            f'<text x="{LEFT + PLOT_W}" y="{TOP + PLOT_H + 11}" font-size="8" '
            'text-anchor="end">40</text>',
            "</g>",
        ]
    )


def picture() -> str:
    """Return the picture, as SVG."""
    kinds = [kind for kind in shipped() if kind not in NOT_DRAWN]
    rows = -(-len(kinds) // COLUMNS)
    size = (COLUMNS * WIDTH, rows * HEIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        f'width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="11" '
        f'fill="{INK}">',
        "<title>The gradient of each loss over the margin</title>",
        "<style>polyline{fill:none;stroke-width:1.6}path{fill:none}</style>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for number, kind in enumerate(kinds):
        parts.append(panel(kind, number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write both files beside this script."""
    (HERE / "objectives.md").write_text(page(), encoding="utf-8")
    (HERE / "objectives.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
