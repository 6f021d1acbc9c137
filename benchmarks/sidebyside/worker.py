"""One arm's process: ``python -m sidebyside.worker``, a `Job` on its first line of input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TextIO

import torch

from alignkit.engine import Example
from alignkit.errors import AlignkitError
from sidebyside.job import Job
from sidebyside.turnstile import Turnstile


def main() -> int:
    """Serve the runner over standard input and output."""
    # Libraries print what they like; the protocol keeps the real output to itself.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return serve(sys.stdin, replies)


def serve(requests: TextIO, replies: TextIO) -> int:
    """Train as the job on the first line says, in the turns that the other lines grant."""
    job = Job.from_json(requests.readline())
    if job.arm.package == "alignkit":
        from sidebyside.arm_alignkit import train
    else:
        from sidebyside.arm_huggingface import train
    torch.manual_seed(0)
    turnstile = Turnstile(job.device, job.lead_in, requests, replies)
    try:
        train(job, read_examples(job.examples), turnstile)
    except (AlignkitError, torch.OutOfMemoryError) as error:
        turnstile.reply({"error": str(error).splitlines()[0]})
        return 2
    return 0


def read_examples(path: str) -> list[Example]:
    """Read what `setup.write_examples` wrote."""
    return [Example(prompt, responses) for prompt, responses in json.loads(Path(path).read_text())]


if __name__ == "__main__":
    sys.exit(main())
