"""What a DPO step with `model.residual: float32`, or a part of it, costs in time.

    python benchmarks/residual.py --base DIR --data DIR --pairs 8 --rounds 5 --json residual.json

All arms take the same step, forward and backward, of the same adapter over the same bf16 base, in
turns: `today` without the option, `residual` with the residual stream in fp32, `logits` with logits
that are not rounded, `both` with the option. Ratios are to `today`. Where the processor has bf16
units, whole steps are timed.

A CPU without such units takes many times as long for a bf16 product, and a whole step would tell of
that alone. There each operator is timed by itself. Matrix products are computed in fp32 and rounded
once (`precision.EmulatedProducts`) and stand apart from all others; `outside` is the time of these
others, such as sums, norms and copies, which the option changes and which need no units.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from precision import PRODUCTS, EmulatedProducts, has_bf16_units, read_pairs

ARMS = ("today", "residual", "logits", "both")


class Clock(EmulatedProducts):
    """Add up the seconds of products and of all other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"products": 0.0, "outside": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        kind = "products" if func.overloadpacket in PRODUCTS else "outside"
        self.seconds[kind] += time.perf_counter() - began
        return out


def model_of(arm: str, base: str) -> Any:
    """Return a base in bf16 with adapters, and with what an arm changes."""
    from alignkit.lora import LoRAConfig
    from alignkit.models.policy import build_policy

    model, _, _ = build_policy(
        base, LoRAConfig(), dtype="bfloat16", random_init=False, dropout=False,
        residual="float32" if arm in ("residual", "both") else "weights",
    )  # fmt: skip
    model._alignkit_exact_logits = arm in ("logits", "both")
    return model


def step_of(arm: str, base: str, batch: Any) -> Any:
    """Return a function that takes one step of an arm and returns its seconds by kind."""
    from alignkit.engine import response_sums, score

    policy, reference = model_of(arm, base), model_of(arm, base).requires_grad_(False)

    def step() -> dict[str, float]:
        clock = nullcontext() if has_bf16_units() else Clock()
        began = time.perf_counter()
        with clock, torch.autocast(policy.device.type, torch.bfloat16):
            with torch.no_grad():
                theirs = response_sums(score(reference, batch), batch)
            ours = response_sums(score(policy, batch), batch) - theirs
            loss = -torch.nn.functional.logsigmoid(0.1 * (ours[::2] - ours[1::2])).mean()
            loss.backward()
        policy.zero_grad()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        whole = {"whole": time.perf_counter() - began}
        return clock.seconds if isinstance(clock, Clock) else whole

    return step


def main() -> None:
    """Measure all arms in turns and print the medians."""
    from alignkit.engine import collate

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="a model of the llama, gpt2 or neox family")
    parser.add_argument("--data", required=True, help="a directory with HH-RLHF's test split")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="most tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batch = collate(read_pairs(options.base, options.data, options.pairs, options.length))
    steps = {arm: step_of(arm, options.base, batch) for arm in ARMS}
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(options.rounds + 1):
        for arm in ARMS if number % 2 else reversed(ARMS):
            taken = steps[arm]()
            if number:  # the first step allocates
                found[arm].append(taken)
    result: dict[str, Any] = {"tokens": batch.num_tokens, "emulated": not has_bf16_units()}
    for kind in found["today"][0]:
        taken = {arm: [each[kind] for each in found[arm]] for arm in ARMS}
        ratios = {
            arm: [one / plain for one, plain in zip(taken[arm], taken["today"], strict=True)]
            for arm in ARMS[1:]
        }
        result[kind] = {
            "seconds": {arm: median(taken[arm]) for arm in ARMS},
            "ratio": {arm: median(each) for arm, each in ratios.items()},
            "ratios": {arm: [min(each), max(each)] for arm, each in ratios.items()},
        }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
