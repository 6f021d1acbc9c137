"""Preparing preference pairs for training: alignkit beside the installed TRL.

    python benchmarks/data.py --data DIR_OR_FILE --tokenizer DIR [--json FILE]

Both start from the same file and a loaded tokenizer and end with token ids that training reads.
Every measurement is a process of its own, in the order A B B A, so that neither side always runs
first; the ratios are medians over the rounds. *Cold* finds an empty cache, *warm* what cold left
there. alignkit's time includes its boundary proof of every pair; TRL has none.

Memory is the peak above what the process held before it began, for the file and for the file
repeated ``--grow`` times.

    python benchmarks/data.py --data … --tokenizer … --before ../before

compares this checkout with another one instead, in the same order: ratios are after / before.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ARMS = ("alignkit", "trl")
STATES = ("cold", "warm")
HERE = Path(__file__).parents[1]


def main() -> int:
    """Measure, print a table, write the JSON; or, as a worker, measure once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, help="a file of pairs, or a directory with train.*"
    )
    parser.add_argument("--tokenizer", required=True, help="a directory with a tokenizer")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of A B B A")
    parser.add_argument("--grow", type=int, default=100, help="how often the file is repeated")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--before", type=Path, help="another checkout of alignkit, instead of TRL")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    if options.before and not (options.before / "alignkit" / "__init__.py").exists():
        parser.error(f"{options.before}: holds no alignkit package")
    with tempfile.TemporaryDirectory() as scratch:
        results = (compare if options.before else measure)(options, Path(scratch))
    print(checkouts_table(results) if options.before else table(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run workers of two checkouts in turn; ratios are this checkout's seconds by the other's."""
    pairs = scratch / "pairs.jsonl"
    lines = read_lines(Path(options.data))
    pairs.write_bytes(b"".join(lines))
    checkouts = {"before": options.before, "after": HERE}
    seconds: dict[str, list[float]] = {f"{arm}_{s}": [] for arm in checkouts for s in STATES}
    examples: dict[str, int] = {}
    for round_ in range(options.repeats):
        for turn, arm in enumerate((*checkouts, *reversed(checkouts))):
            cache = scratch / f"cache-{round_}-{turn}"
            for state in STATES:
                run = start(options, "alignkit", pairs, cache, checkouts[arm])
                seconds[f"{arm}_{state}"].append(run["seconds"])
                examples[arm] = run["examples"]
                print(".", end="", file=sys.stderr, flush=True)
    print("", file=sys.stderr)
    ratios = {
        state: [
            after / before
            for before, after in zip(
                seconds[f"before_{state}"], seconds[f"after_{state}"], strict=True
            )
        ]
        for state in STATES
    }
    return {
        "ratios": {state: statistics.median(found) for state, found in ratios.items()},
        "all_ratios": ratios,
        "pairs": len(lines),
        "examples": examples,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "machine": machine(),
    }


def checkouts_table(results: dict[str, Any]) -> str:
    """Return the comparison of two checkouts for a person."""
    seconds, ratios = results["seconds"], results["ratios"]
    rows = [f"{'':28}{'before':>12}{'after':>12}{'ratio':>9}"]
    for state, told in (("cold", "encode, s"), ("warm", "start with a warm cache, s")):
        spread = sorted(results["all_ratios"][state])
        rows.append(
            f"{told:28}{seconds[f'before_{state}']:12.4f}{seconds[f'after_{state}']:12.4f}"
            f"{ratios[state]:9.3f}   ({spread[0]:.3f} to {spread[-1]:.3f})"
        )
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("trl", "datasets", "tokenizers", "transformers")},
    }


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run every worker in turn."""
    pairs = scratch / "pairs.jsonl"
    lines = read_lines(Path(options.data))
    pairs.write_bytes(b"".join(lines))
    runs: dict[str, list[dict[str, Any]]] = {
        f"{arm}_{state}": [] for arm in ARMS for state in STATES
    }
    for round_ in range(options.repeats):
        for turn, arm in enumerate((*ARMS, *reversed(ARMS))):
            cache = scratch / f"cache-{round_}-{turn}"
            for state in STATES:
                runs[f"{arm}_{state}"].append(start(options, arm, pairs, cache))
                print(".", end="", file=sys.stderr, flush=True)
    grown = scratch / "grown.jsonl"
    with grown.open("wb") as file:
        for _ in range(options.grow):
            file.writelines(lines)
    many = start(options, "alignkit", grown, scratch / "cache-grown")
    print("", file=sys.stderr)
    seconds = {
        name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()
    }
    once = statistics.median(run["peak_bytes"] for run in runs["alignkit_cold"])
    return {
        "ratios": {
            "encode_speed_vs_trl": paired(runs, "cold", "cold"),
            "warm_start_vs_trl": paired(runs, "warm", "warm"),
            "warm_start_vs_trl_cold": paired(runs, "cold", "warm"),
            "peak_growth": many["peak_bytes"] / once,
        },
        "pairs": len(lines),
        "pairs_per_second": {arm: len(lines) / seconds[f"{arm}_cold"] for arm in ARMS},
        "seconds": seconds,
        "batch_ms": statistics.median(run["batch_ms"] for run in runs["alignkit_warm"]),
        "examples": {arm: runs[f"{arm}_cold"][0]["examples"] for arm in ARMS},
        "memory": {
            "file_bytes": pairs.stat().st_size,
            "peak_bytes": once,
            "grown_pairs": len(lines) * options.grow,
            "grown_file_bytes": grown.stat().st_size,
            "grown_peak_bytes": many["peak_bytes"],
            "grown_seconds": many["seconds"],
        },
        "runs": runs,
        "machine": machine(),
    }


def paired(runs: dict[str, list[dict[str, Any]]], theirs: str, ours: str) -> float:
    """Median over the rounds of TRL's time by alignkit's."""
    return statistics.median(
        trl["seconds"] / alignkit["seconds"]
        for trl, alignkit in zip(runs[f"trl_{theirs}"], runs[f"alignkit_{ours}"], strict=True)
    )


def read_lines(path: Path) -> list[bytes]:
    """The training file's lines."""
    if path.is_dir():
        path = next(each for each in sorted(path.iterdir()) if each.name.startswith("train."))
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [line.rstrip(b"\n") + b"\n" for line in file if line.strip()]


def start(
    options: argparse.Namespace, arm: str, pairs: Path, cache: Path, checkout: Path = HERE
) -> dict[str, Any]:
    """Run one worker on a checkout's package and return what it measured."""
    command = [sys.executable, __file__, "--worker", arm, "--data", str(pairs)]
    command += ["--tokenizer", options.tokenizer, "--max_length", str(options.max_length)]
    command += ["--cache", str(cache)]
    if options.before:
        command += ["--before", str(options.before)]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(checkout.resolve()),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: everything is imported and the tokenizer loaded before the clock starts."""
    from alignkit.models import load_tokenizer

    logging.disable()
    tokenizer = load_tokenizer(options.tokenizer)
    prepare = prepare_with_trl(options) if options.worker == "trl" else prepare_with_us(options)
    tokenizer(["Both sides find the tokenizer used once.", "And its threads started."])
    gc.collect()  # or the garbage of the imports is collected at some point of either side's time
    if options.before:  # another checkout may measure memory elsewhere, or not at all
        began = time.perf_counter()
        prepared = prepare(tokenizer)
        return {"seconds": time.perf_counter() - began, "examples": len(prepared)}
    return measured(lambda: prepare(tokenizer))


def measured(prepare: Callable[[], Any]) -> dict[str, Any]:
    """Measure a preparation's seconds, peak memory and batches."""
    import torch

    from alignkit.utils.memory import peak_bytes, reset_peak

    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_bytes(cpu)
    began = time.perf_counter()
    prepared = prepare()
    seconds = time.perf_counter() - began
    peak = peak_bytes(cpu) - before
    return {"seconds": seconds, "peak_bytes": peak, "examples": len(prepared), **batches(prepared)}


def batches(prepared: Any) -> dict[str, float]:
    """What a packed batch of 4,096 tokens costs the training process, without worker processes."""
    if not hasattr(prepared, "train_dataloader"):
        return {}
    loader = prepared.train_dataloader()
    began = time.perf_counter()
    count = sum(1 for _ in loader)
    return {"batch_ms": (time.perf_counter() - began) / count * 1e3}


def prepare_with_us(options: argparse.Namespace) -> Any:
    """The data module's own setup, given the loaded tokenizer."""
    from alignkit.data import HHPreferenceDataModule, base

    class Prepared(HHPreferenceDataModule):
        def __len__(self) -> int:
            return int(self.stats["examples"])

    def prepare(tokenizer: Any) -> Prepared:
        base.load_tokenizer = lambda _: tokenizer
        data = Prepared(
            options.tokenizer,
            options.data,
            max_length=options.max_length,
            cache_dir=options.cache,
        )
        data.setup("fit")
        return data

    return prepare


def prepare_with_trl(options: argparse.Namespace) -> Any:
    """What DPOTrainer does to a JSON file before it trains."""
    import datasets
    from trl import DPOTrainer

    datasets.disable_progress_bars()
    settings = SimpleNamespace(
        dataset_num_proc=None, max_length=options.max_length, truncation_mode="keep_start"
    )

    def prepare(tokenizer: Any) -> Any:
        rows = datasets.load_dataset("json", data_files=options.data, split="train")
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
        return DPOTrainer._prepare_dataset(trainer, rows, tokenizer, settings, "train")

    return prepare


def table(results: dict[str, Any]) -> str:
    """The results for a person."""
    seconds, ratios, memory = results["seconds"], results["ratios"], results["memory"]
    mib = 2**20
    return "\n".join(
        [
            f"{'':28}{'alignkit':>12}{'TRL':>12}{'ratio':>9}",
            f"{'encode, s':28}{seconds['alignkit_cold']:12.3f}{seconds['trl_cold']:12.3f}"
            f"{ratios['encode_speed_vs_trl']:8.1f}x",
            f"{'encode, pairs/s':28}{results['pairs_per_second']['alignkit']:12.0f}"
            f"{results['pairs_per_second']['trl']:12.0f}",
            f"{'start with a warm cache, s':28}{seconds['alignkit_warm']:12.3f}"
            f"{seconds['trl_warm']:12.3f}{ratios['warm_start_vs_trl']:8.1f}x",
            f"  (against TRL without its cache: {ratios['warm_start_vs_trl_cold']:.0f}x)",
            f"a batch of 4,096 tokens: {results['batch_ms']:.2f} ms",
            f"peak memory: {memory['peak_bytes'] / mib:.0f} MiB for {results['pairs']:,} pairs, "
            f"{memory['grown_peak_bytes'] / mib:.0f} MiB for {memory['grown_pairs']:,} "
            f"({memory['grown_file_bytes'] / mib:.0f} MiB of text)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
