"""Ranked answers that share their prompt, beside the same answers in a row each.

    python benchmarks/ranked.py --model DIR --data HH_DIR --json ranked.json

Each prompt gets ``--answers`` answers, drawn from those of the pairs. One arm packs a prompt with
all its answers, as `alignkit fit` does; the other repeats the prompt before every answer. Both take
Plackett–Luce's loss with a live reference, forward and backward, over the same micro-batch budget,
and must agree on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import alternate, micro_batches
from rich.console import Console
from sidebyside import machine, options, output
from sidebyside.examples import draw
from sidebyside.script import measure
from sidebyside.setup import prepare
from torch import Tensor

from alignkit import DPOModule
from alignkit.engine import Example, PackedBatch, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.objectives.ranked import PlackettLuce

_PROMPTS = {"cpu": 8, "cuda": 64}
_TOLERANCE = 1e-4  # relative; both arms compute in fp32 when they are compared


@dataclass(frozen=True)
class Chosen(options.Common):
    """What this script is told.

    Attributes:
        prompts: How many an optimizer step has.
        answers: How many answers each has.
    """

    prompts: int
    answers: int


def run(chosen: Chosen, console: Console, work: Path) -> dict[str, Any]:
    """Measure and print; returns what is written to the file of numbers."""
    shared = prepare(chosen, work)
    pairs = draw(
        "dpo", chosen.prompts * chosen.answers, chosen, shared.tokenizer, shared.config.vocab_size
    )
    pool = [answer for pair in pairs for answer in pair.responses]
    ranked = [
        Example(pair.prompt, pool[start : start + chosen.answers])
        for pair, start in zip(pairs, range(0, len(pool), chosen.answers), strict=False)
    ][: chosen.prompts]
    dpo = DPOModule(
        shared.model,
        lora=shared.lora,
        init_from=shared.adapter,
        dtype=chosen.dtype,
        loss=PlackettLuce(),
    )
    dpo.to(chosen.device).train()
    rows = micro_batches(ranked, chosen.tokens_per_batch)
    together = [collate(row).to(chosen.device) for row in rows]
    apart = [
        [
            collate(row).to(chosen.device)
            for row in micro_batches(alone(examples), chosen.tokens_per_batch)
        ]
        for examples in rows
    ]
    counts = [[chosen.answers] * len(examples) for examples in rows]

    def shared_prompts() -> float:
        total = 0.0
        for batch in together:
            loss = dpo.compute_loss(batch).loss_sum
            loss.backward()
            total += float(loss.detach())
        dpo.zero_grad()
        return total

    def repeated_prompts() -> float:
        total = 0.0
        for batches, sizes in zip(apart, counts, strict=True):
            total += separate(dpo, batches, sizes)
        dpo.zero_grad()
        return total

    difference = compare(dpo, shared_prompts, repeated_prompts)
    arms: dict[int | str, Callable[[], object]] = {
        "shared": shared_prompts,
        "apart": repeated_prompts,
    }
    seconds = alternate(arms, chosen.rounds, chosen.device)
    tokens = {
        "shared": sum(example.num_tokens for example in ranked),
        "apart": sum(example.num_tokens for example in alone(ranked)),
    }
    result = {
        "speed": seconds["apart"] / seconds["shared"],
        "seconds_per_prompt": {name: each / len(ranked) for name, each in seconds.items()},
        "tokens": tokens,
        "loss_difference": difference,
        "machine": machine.describe(chosen.device)
        | {"model": chosen.model, "command": output.command()},
    }
    console.print(
        f"{len(ranked)} prompts with {chosen.answers} answers each: {result['speed']:.2f} times as "
        f"fast with shared prompts ({tokens['shared']:,} tokens for {tokens['apart']:,}); the "
        f"losses differ by {difference:.1e}",
        highlight=False,
    )
    return result


def alone(examples: Sequence[Example]) -> list[Example]:
    """Return each answer as an example with a prompt of its own."""
    return [Example(each.prompt, [answer]) for each in examples for answer in each.responses]


def separate(dpo: DPOModule, batches: Sequence[PackedBatch], sizes: Sequence[int]) -> float:
    """Take the loss over answers in rows of their own, as a loop without shared prompts would.

    All rows' activations are kept until the loss is known, so that nothing is computed twice.
    """
    assert dpo.reference is not None and dpo.reference.model is not None
    policy = torch.cat([response_sums(score(dpo.model, each), each) for each in batches])
    with torch.no_grad():
        base = torch.cat([response_sums(score(dpo.reference.model, e), e) for e in batches])
    loss = plackett_luce(policy - base, sizes, dpo.loss.beta)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def plackett_luce(ratios_R: Tensor, sizes: Sequence[int], beta: float) -> Tensor:
    """Return the loss of ranked answers, the best first, as one would write it down."""
    total = ratios_R.new_zeros(())
    for rewards in torch.split(beta * ratios_R, list(sizes)):
        for place in range(len(rewards)):
            total = total - rewards[place] + rewards[place:].logsumexp(0)
    return total


def compare(dpo: DPOModule, one: Callable[[], float], other: Callable[[], float]) -> float:
    """Return how far the arms' losses differ, relative.

    Raises:
        AlignkitError: They differ by more than rounding.
    """
    first, second = one(), other()
    difference = abs(first - second) / abs(second)
    tolerance = _TOLERANCE if dpo.dtype == torch.float32 else 100 * _TOLERANCE
    if difference > tolerance:
        raise AlignkitError(f"the arms' losses differ: {first} and {second}")
    return difference


def parse() -> Chosen:
    """Read the command line."""
    flags = options.common_parser("Ranked answers with shared prompts.", rounds=3)
    flags.add_argument("--prompts", type=int, help="of a step")
    flags.add_argument("--answers", type=int, default=8, help="to each prompt")
    return Chosen(**options.read_alone(flags.parse_args(), prompts=_PROMPTS))


if __name__ == "__main__":
    sys.exit(measure(parse, run))
