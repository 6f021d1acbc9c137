"""Two checkouts of alignkit side by side: did a change cost time or memory?

    git worktree add ../before v0.1.0
    python benchmarks/checkouts.py --before ../before --rounds 5 --json checkouts.json

Each checkout has a process of its own that imports its package and trains the same random models on
the same pairs; the processes take steps in turns. Ratios are after / before: the median over the
rounds' seconds, and the processes' peaks of memory, libraries and all. Losses have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

# Layers and widths at which a step takes some tenths of a second on two cores.
SHAPES = ("gpt2", "gpt_neox", "llama")
STAGES = ("SFTModule", "DPOModule")
_SIZES = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
_TOLERANCE = 1e-5  # nats by which two checkouts' losses may differ


def main() -> int:
    """Compare two checkouts and print the ratios; return 1 where their losses differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout's folder")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(json.loads(options.work))
    for checkout in (options.before, options.after):
        if not (checkout / "alignkit" / "__init__.py").exists():
            parser.error(f"{checkout}: holds no alignkit package")
    found, same = [], True
    with TemporaryDirectory() as models:
        for shape in options.shapes:
            write_model(shape, Path(models) / shape)
            for stage in STAGES:
                job = {"model": f"{models}/{shape}", "stage": stage, "pairs": options.pairs}
                row = compare(job, options)
                same &= row["loss_difference"] <= _TOLERANCE
                found.append({"shape": shape, "stage": stage, **row})
                print(
                    f"{shape:9} {stage:10} time {row['time']:.3f} "
                    f"({min(row['times']):.3f} to {max(row['times']):.3f})  memory "
                    f"{row['memory']:.3f}  loss differs by {row['loss_difference']:.1e}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if same else 1


def compare(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Let one process a checkout train in turns, and compare what they took."""
    workers = [start(checkout, job) for checkout in (options.before, options.after)]
    ratios, difference = [], 0.0
    for turn in range(options.rounds + 1):
        order = workers if turn % 2 else workers[::-1]
        took = {worker.pid: ask(worker, options.steps) for worker in order}
        before, after = (took[worker.pid] for worker in workers)
        pairs = zip(before["losses"], after["losses"], strict=True)
        difference = max(difference, *(abs(a - b) for a, b in pairs))
        if turn:  # the first turn warms up
            ratios.append(after["seconds"] / before["seconds"])
    peaks = [ask(worker, 0)["peak"] for worker in workers]
    for worker in workers:
        worker.terminate()
        worker.wait()
    return {
        "time": statistics.median(ratios),
        "times": ratios,
        "memory": peaks[1] / peaks[0],
        "loss_difference": difference,
    }


def start(checkout: Path, job: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a process that imports a checkout's package."""
    return subprocess.Popen(
        [sys.executable, __file__, "--before", ".", "--work", json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"},
    )


def ask(worker: subprocess.Popen[str], steps: int) -> dict[str, Any]:
    """Have a process take steps; zero ask for its peak."""
    stream = cast("IO[str]", worker.stdin)
    stream.write(f"{steps}\n")
    stream.flush()
    answer = cast("IO[str]", worker.stdout).readline()
    if not answer:
        sys.exit(f"error: a worker ended with status {worker.wait()}; see it run alone with --work")
    return cast("dict[str, Any]", json.loads(answer))


def write_model(shape: str, directory: Path) -> None:
    """Save a small random model of a shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    more = {} if shape == "gpt2" else {"intermediate_size": 1024}
    config = AutoConfig.for_model(shape, **_SIZES, **more, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def work(job: dict[str, Any]) -> int:
    """Train one module, a turn a line of standard input."""
    import torch

    import alignkit
    from alignkit.engine import Example, collate

    torch.manual_seed(0)
    draw = random.Random(0)
    module = getattr(alignkit, job["stage"])(job["model"], lora={"targets": "all-linear"}).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for line in sys.stdin:
        batches, losses = [], []
        for _ in range(int(line)):
            examples = []
            for _ in range(job["pairs"]):
                lengths = draw.randint(20, 80), draw.randint(10, 60), draw.randint(10, 60)
                prompt, *answers = ([draw.randrange(1, 8192) for _ in range(n)] for n in lengths)
                examples.append(Example(prompt, answers[: 2 if job["stage"] == "DPOModule" else 1]))
            batches.append(collate(examples))
        began = time.perf_counter()
        for batch in batches:
            out = module.compute_loss(batch)
            loss = out.loss_sum / out.weight
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        taken = {"seconds": time.perf_counter() - began, "losses": losses, "peak": peak()}
        print(json.dumps(taken), flush=True)
    return 0


def peak() -> int:
    """Return the most bytes that this process has held at once."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
