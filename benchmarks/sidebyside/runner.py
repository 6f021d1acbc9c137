"""Starts one process an arm and lets them train in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

from alignkit.engine.onednn import LIMITS
from alignkit.errors import AlignkitError
from sidebyside.job import Arm, Job

_BENCHMARKS = Path(__file__).parents[1]
# Everything an arm reads is on disk by now; nothing waits for a network that may not be there.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Products that PyTorch's libraries keep where alignkit, which a worker imports, sets no limit.
_LIMIT = "1024"


class Taken(NamedTuple):
    """What an arm reports of one turn.

    Attributes:
        seconds: Of the measured steps.
        peak_bytes: Most memory in use during them, above what was in use before training.
        total_bytes: Most memory in use during them, everything counted.
        losses: Of every step of the turn, measured or not.
    """

    seconds: float
    peak_bytes: int
    total_bytes: int
    losses: list[float]


class Worker:
    """An arm's process, which stands before its first step after `ready`.

    Args:
        job: What it does.
        log: A file for everything the libraries print.

    Attributes:
        logps: log π(y|x) of the job's scored examples, before training.
        loaded_bytes: Memory in use before the first step.
    """

    logps: list[float]
    loaded_bytes: int

    def __init__(self, job: Job, log: Path) -> None:
        self._name, self._log = job.arm.name, log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sidebyside.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=environment(job.arm),
            )
        self._tell(job.to_json())

    def ready(self) -> Worker:
        """Wait until the model is loaded; processes may load at the same time.

        Raises:
            AlignkitError: The process failed; its last line of output is the reason.
        """
        found = self._hear()
        self.logps, self.loaded_bytes = found["logps"], found["loaded_bytes"]
        return self

    def take(self, steps: int) -> Taken:
        """Let it take this many optimizer steps; nothing else trains meanwhile."""
        self._tell(str(steps))
        return Taken(**self._hear())

    def close(self) -> None:
        """End the process, whatever it still has to do."""
        _input(self._process).close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # `_hear` says why the process ended
            _input(self._process).write(line + "\n")
            _input(self._process).flush()

    def _hear(self) -> dict[str, Any]:
        answer = _output(self._process).readline()
        if not answer:
            raise self._failure()
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise AlignkitError(f"{self._name}: {values['error']}")
        return values

    def _failure(self) -> AlignkitError:
        code = self._process.wait()
        if code < 0:
            return AlignkitError(f"{self._name}: killed (signal {-code}), likely out of memory")
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return AlignkitError(f"{self._name}: failed; {lines[-1] if lines else 'no message'}")


def environment(arm: Arm) -> dict[str, str]:
    """Return an arm's environment: this process's, without what alignkit set for itself."""
    path = os.pathsep.join([str(_BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    caches = {} if arm.package == "alignkit" else dict.fromkeys(LIMITS, _LIMIT)
    return {**os.environ, **_OFFLINE, **caches, "PYTHONPATH": path}


def _input(process: subprocess.Popen[str]) -> IO[str]:
    return cast("IO[str]", process.stdin)


def _output(process: subprocess.Popen[str]) -> IO[str]:
    return cast("IO[str]", process.stdout)
