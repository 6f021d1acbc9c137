"""Encoding a large file in one process and in several: time, memory, and what more would give.

    python benchmarks/encoding.py --data DIR_OR_FILE --tokenizer DIR [--kind pairs|text] \\
        [--grow 10 100] [--processes 1 2] [--rounds 2] [--json FILE]

The training file is repeated ``--grow`` times. Every measurement is a process of its own on an
empty cache; numbers of processes take turns, and all must write the same bytes. *Peak* is what the
main process held at most, above what it held before, and what the largest other process held.
*Start* is the time for a file of eight rows, and *warm* the time to open the encoded set again.

The last lines are arithmetic from CPU seconds, which a busy machine changes little, less those of
eight rows: ``n`` processes make at most ``n / others`` rows a second, and the main one, which reads
rows, sends them and writes examples, at most ``1 / main``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from data import read_lines

MIB = 2**20


def main() -> int:
    """Measure, print a table, write the JSON; or, as a worker, measure once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="a file of rows, or a directory with train.*")
    add("--tokenizer", required=True, help="a directory with a tokenizer")
    add("--kind", choices=["pairs", "text"], default="pairs")
    add("--grow", type=int, nargs="+", default=[10, 100], help="how often the file is repeated")
    add("--processes", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=2, help="of the smallest file; the others are taken once")
    add("--json", type=Path, help="write the results to this file")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    lines = read_lines(Path(options.data))
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(options, lines, Path(scratch))
    results["machine"] = {"platform": platform.platform(), "python": platform.python_version()}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, lines: list[bytes], scratch: Path) -> dict[str, Any]:
    """Take every file with every number of processes in turn."""
    few = scratch / "few.jsonl"
    few.write_bytes(b"".join(lines[:8]))
    runs: list[dict[str, Any]] = []
    for grow in sorted(options.grow):
        file = scratch / f"grown-{grow}.jsonl"
        with file.open("wb") as writing:
            for _ in range(grow):
                writing.writelines(lines)
        for turn in range(options.rounds if grow == min(options.grow) else 1):
            for count in options.processes[:: -1 if turn % 2 else 1]:
                with tempfile.TemporaryDirectory(dir=scratch) as cache:
                    start = once(options, few, count, f"{cache}/few")
                    cold = once(options, file, count, f"{cache}/all")
                    warm = once(options, file, count, f"{cache}/all")["seconds"]
                cold |= {"processes": count, "grow": grow, "rows": grow * len(lines)}
                cold |= {"start": start["seconds"], "warm": warm}
                for who in ("main", "others"):
                    used = cold[f"{who}_cpu"] - start[f"{who}_cpu"]
                    cold[f"{who}_us"] = used / cold["rows"] * 1e6
                runs.append({**cold, "file_bytes": file.stat().st_size})
                print(".", end="", file=sys.stderr, flush=True)
        if len({run["digest"] for run in runs if run["grow"] == grow}) > 1:
            raise SystemExit(f"{grow}x: the processes wrote other bytes")
        file.unlink()
    print("", file=sys.stderr)
    return {"runs": runs, "rows": len(lines), "arithmetic": arithmetic(runs)}


def arithmetic(runs: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds a row, of the largest file: in one process, and shared out."""
    largest = [run for run in runs if run["grow"] == max(run["grow"] for run in runs)]
    alone, *_, several = sorted(largest, key=lambda run: run["processes"])
    return {
        "alone_us": alone["main_us"],
        "main_us": several["main_us"],
        "others_us": several["others_us"],
        "useful_processes": several["others_us"] / several["main_us"],
        "most_rows_per_second": 1e6 / several["main_us"],
    }


def once(options: argparse.Namespace, file: Path, count: int, cache: str) -> dict[str, Any]:
    """Run one worker and return what it measured."""
    command = [sys.executable, __file__, "--worker", str(count), "--data", str(file)]
    command += ["--tokenizer", options.tokenizer, "--kind", options.kind, "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: everything is imported before the clock starts."""
    from alignkit.data import HHPreferenceDataModule, TextDataModule

    logging.disable()
    kind = HHPreferenceDataModule if options.kind == "pairs" else TextDataModule
    data = kind(options.tokenizer, options.data, cache_dir=options.cache, num_proc=options.worker)
    held, used = peak(resource.RUSAGE_SELF), cpu(resource.RUSAGE_SELF)
    began = time.perf_counter()
    data.prepare_data()
    return {
        "seconds": time.perf_counter() - began,
        "main_peak": peak(resource.RUSAGE_SELF) - held,
        "other_peak": peak(resource.RUSAGE_CHILDREN),
        "main_cpu": cpu(resource.RUSAGE_SELF) - used,
        "others_cpu": cpu(resource.RUSAGE_CHILDREN),
        "examples": data.stats["examples"],
        "digest": digest(Path(options.cache)),
    }


def digest(cache: Path) -> str:
    """Hash every file of the encoded sets."""
    found = hashlib.blake2b()
    for file in sorted((cache / "encoded").glob("*/*")):
        with file.open("rb") as reading:
            found.update(file.name.encode() + hashlib.file_digest(reading, "blake2b").digest())
    return found.hexdigest()


def peak(who: int) -> int:
    """Bytes that a process held at most."""
    return resource.getrusage(who).ru_maxrss * 1024


def cpu(who: int) -> float:
    """Seconds on a core."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def table(results: dict[str, Any]) -> str:
    """The results for a person."""
    columns = ("rows", "processes", "rows/s", "CPU main, others (s)", "peak main, other (MiB)")
    told = ["  ".join([*columns, "start, warm (s)"])]
    keys = sorted({(run["rows"], run["processes"]) for run in results["runs"]})
    for rows, count in keys:
        runs = [r for r in results["runs"] if (r["rows"], r["processes"]) == (rows, count)]
        middle = {key: median(run[key] for run in runs) for key in runs[0] if key != "digest"}
        told.append(
            f"{rows:<10,}{count:9}{rows / middle['seconds']:8.0f}{middle['main_cpu']:12.1f}"
            f"{middle['others_cpu']:10.1f}{middle['main_peak'] / MIB:14.0f}"
            f"{middle['other_peak'] / MIB:10.0f}{middle['start']:9.1f}{middle['warm']:10.3f}"
        )
    told += [f"{name}: {value:,.1f}" for name, value in results["arithmetic"].items()]
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(main())
