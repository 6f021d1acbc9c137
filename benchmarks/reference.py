"""What DPO's reference costs: in rows of growing length, and read from the cache.

    python benchmarks/reference.py --model DIR --data HH_DIR --json reference.json

The policy's rows are bounded by the activations that its backward pass needs, which a reference
does not keep. The first table scores the same pairs under inference mode in rows of growing
length: where it is flat, longer rows for the reference would buy nothing. The second takes DPO's
forward and backward pass with the reference scored live and read from a filled cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sidebyside import machine, options, output
from sidebyside.examples import draw
from sidebyside.script import measure
from sidebyside.setup import Shared, prepare

from alignkit import DPOModule
from alignkit.data.deal.samplers import TokenBudgetBatchSampler
from alignkit.engine import Example, PackedBatch, collate, score

_PAIRS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class Chosen(options.Common):
    """What this script is told.

    Attributes:
        longest_row: The first table ends here.
        pairs: How many are scored.
    """

    longest_row: int
    pairs: int


def micro_batches(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """The examples in micro-batches of up to ``budget`` tokens."""
    lengths = [example.num_tokens for example in examples]
    sampler = TokenBudgetBatchSampler(lengths, budget, shuffle=False, equal=False)
    return [[examples[index] for index in batch] for batch in sampler]


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(
    arms: Mapping[int | str, Callable[[], object]], rounds: int, device: str
) -> dict[int | str, float]:
    """Run every arm in turn, every second round backwards; medians of seconds."""
    for work in arms.values():
        work()
    found: dict[int | str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in reversed(arms) if number % 2 else arms:
            found[name].append(timed(arms[name], device))
    return {name: median(seconds) for name, seconds in found.items()}


def run(chosen: Chosen, console: Console, work: Path) -> dict[str, Any]:
    """Measure and print; returns what is written to the file of numbers."""
    with console.status("model and adapter"):
        shared = prepare(chosen, work)
        tokenizer, vocabulary = shared.tokenizer, shared.config.vocab_size
        examples = draw("dpo", chosen.pairs, chosen, tokenizer, vocabulary)
        tokens = sum(example.num_tokens for example in examples)
        live, cached = (module(chosen, shared, cache) for cache in (None, str(work / "cache")))

    def scoring(batches: list[PackedBatch]) -> Callable[[], object]:
        def all_rows() -> None:
            with torch.inference_mode():
                for batch in batches:
                    score(live.reference.model, batch)

        return all_rows

    budgets = [chosen.tokens_per_batch // 4]
    while 2 * budgets[-1] <= chosen.longest_row:
        budgets.append(2 * budgets[-1])
    laid = {
        budget: [collate(row).to(chosen.device) for row in micro_batches(examples, budget)]
        for budget in budgets
    }
    with console.status("the reference in rows of growing length"):
        lengths = alternate(
            {budget: scoring(batches) for budget, batches in laid.items()},
            chosen.rounds,
            chosen.device,
        )
    steps = micro_batches(examples, chosen.tokens_per_batch)

    def training(dpo: DPOModule, batches: Sequence[PackedBatch]) -> Callable[[], object]:
        def all_steps() -> None:
            for step in batches:
                batch = dpo.on_before_batch_transfer(step, 0).to(chosen.device)
                dpo.compute_loss(batch).loss_sum.backward()
                dpo.zero_grad()
            if dpo.reference is not None:
                dpo.reference.write_cache()

        return all_steps

    plain = [collate(step) for step in steps]
    with console.status("DPO with a live and with a cached reference"):
        arms: dict[int | str, Callable[[], object]] = {
            "live": training(live, plain),
            "cached": training(cached, plain),
        }
        passes = alternate(arms, chosen.rounds, chosen.device)
    result = {
        "rows": [
            {
                "tokens_per_batch": budget,
                "mean_row_tokens": tokens / len(laid[budget]),
                "microseconds_per_token": 1e6 * lengths[budget] / tokens,
            }
            for budget in budgets
        ],
        "seconds_per_pair": {name: seconds / len(examples) for name, seconds in passes.items()},
        "cached_speed": passes["live"] / passes["cached"],
        "policy_row_tokens": tokens / len(steps),
        "machine": machine.describe(chosen.device)
        | {"model": chosen.model, "command": output.command()},
    }
    show(console, result)
    return result


def module(chosen: Chosen, shared: Shared, cache: str | None) -> DPOModule:
    """DPO from the shared adapter, as it trains."""
    dpo = DPOModule(
        shared.model,
        lora=shared.lora,
        init_from=shared.adapter,
        dtype=chosen.dtype,
        reference_cache=cache,
    )
    return dpo.to(chosen.device).train()


def show(console: Console, result: Mapping[str, Any]) -> None:
    """Print both tables."""
    table = Table(title="the reference alone, under inference mode")
    for header in ("budget", "mean row", "µs/token"):
        table.add_column(header, justify="right")
    for point in result["rows"]:
        table.add_row(
            f"{point['tokens_per_batch']:,}",
            f"{point['mean_row_tokens']:.0f}",
            f"{point['microseconds_per_token']:.1f}",
        )
    console.print(table)
    seconds = result["seconds_per_pair"]
    console.print(
        f"DPO in rows of {result['policy_row_tokens']:.0f} tokens, s/pair: "
        f"{seconds['live']:.4f} live; "
        f"{seconds['cached']:.4f} cached ({result['cached_speed']:.2f}x)",
        highlight=False,
    )


def parse() -> Chosen:
    """Read the command line."""
    flags = options.common_parser("What DPO's reference costs.", rounds=3)
    flags.add_argument("--longest-row", type=int, default=16384, help="tokens")
    flags.add_argument("--pairs", type=int, help="how many are scored")
    return Chosen(**options.read_alone(flags.parse_args(), pairs=_PAIRS))


if __name__ == "__main__":
    sys.exit(measure(parse, run))
