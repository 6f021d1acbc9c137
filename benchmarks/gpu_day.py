"""Everything that only a GPU can show, within ten minutes, a line of JSON for every figure.

    python benchmarks/gpu_day.py --out DIR
    python benchmarks/gpu_day.py --out DIR --parts steps,attention --limit 300

Figures go to ``DIR/figures.jsonl`` as soon as they are known, so that an interrupted run counts; a
part that is whole there is not run again, and the others go on where they stopped. ``--tiny`` tries
every part with sizes of no interest, on a CPU as well. The exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from gpuday.day import Day, lengths_of
from gpuday.record import Figures
from gpuday.run import PARTS, Poisoned, go_on, run
from sidebyside import machine
from sidebyside.options import resolve_device
from transformers.utils.logging import disable_progress_bar

from alignkit.data.read.hashes import digest_of
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import make_writable_folder


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = flags.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="where figures.jsonl lies")
    add("--parts", default=",".join(PARTS), help="which, in which order; all by default")
    add("--limit", type=float, default=540.0, help="seconds, shared out among the parts")
    add("--lengths", metavar="FILE", help="token counts of real pairs; see lengths.py")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--tiny", action="store_true", help="try everything with sizes of no interest")
    add("--again", action="store_true", help="run parts that are whole, too")
    add("--failed-before", action="store_true", help=argparse.SUPPRESS)
    return flags


def main() -> int:
    """Run the parts; 1 where one failed, 2 for a user's mistake."""
    chosen = parser().parse_args()
    parts = [part.strip() for part in chosen.parts.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    try:
        if not parts:
            raise AlignkitError(f"--parts: names none; choose from {', '.join(PARTS)}")
        if not math.isfinite(chosen.limit):
            raise AlignkitError(f"--limit {chosen.limit}: give a number of seconds")
        if unknown:
            raise AlignkitError(f"--parts: no part {unknown[0]}; choose from {', '.join(PARTS)}")
        device = resolve_device(chosen.device)
        if device == "cpu" and not chosen.tiny:
            raise AlignkitError("--device cpu: only --tiny runs without a GPU")
        lengths = lengths_of(chosen.lengths)
        make_writable_folder(chosen.out)
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet()
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tiny": chosen.tiny,
        "versions": {
            **machine.versions("triton", "bitsandbytes", "datasets"),
            "lengths": digest_of(json.dumps(lengths).encode()),
        },
    }
    figures = Figures(chosen.out / "figures.jsonl", about, chosen.again)
    try:
        with tempfile.TemporaryDirectory(prefix="alignkit-gpu-day-") as scratch:
            failed = run(
                Day(figures, device, chosen.tiny, Path(scratch), lengths), parts, chosen.limit
            )
    except KeyboardInterrupt:
        print(f"stopped; {figures.path} holds what was measured", file=sys.stderr)
        return 130
    except Poisoned as poisoned:
        if poisoned.left:
            go_on(poisoned, passed_on(chosen))
        failed = poisoned.failed
    if failed:
        print(f"failed: {', '.join(failed)}; see {figures.path}", file=sys.stderr)
    return int(bool(failed) or chosen.failed_before)


def passed_on(chosen: argparse.Namespace) -> list[str]:
    """The flags of a process that goes on with other parts."""
    flags = ["--out", str(chosen.out), "--device", chosen.device]
    flags += ["--lengths", chosen.lengths] if chosen.lengths else []
    return flags + [f"--{name}" for name in ("tiny", "again") if getattr(chosen, name)]


def quiet() -> None:
    """Keep what libraries advise out of the way of the figures."""
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
