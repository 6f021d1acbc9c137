"""Lets a training loop take some optimizer steps, then wait for its next turn.

A worker's loop runs inside a library's trainer; a callback calls `gate` before every optimizer
step. Between turns the process sleeps in a read, so that the others have the machine to
themselves, and what is measured lies between two calls of `gate`: fetching the batch, forward,
backward, the optimizer and whatever the trainer does around them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from alignkit.utils.memory import peak_bytes, reset_peak


class Turnstile:
    """Speaks with the runner: numbers of steps come in, a JSON line a turn goes out.

    Args:
        device: Where the arm trains.
        lead_in: Steps of every turn that are not measured.
        requests: Where the runner's lines come from.
        replies: Where answers go.
    """

    def __init__(self, device: str, lead_in: int, requests: TextIO, replies: TextIO) -> None:
        self._device = torch.device(device)
        self._lead_in = lead_in
        self._requests, self._replies = requests, replies
        self._taken = self._granted = 0
        self._start = 0.0
        self._loaded = 0
        self.losses: list[Tensor] = []
        """Of the steps of this turn so far; the arm appends to it."""

    def loaded(self) -> None:
        """Note the memory in use: the loop stands before its first step, the model is loaded."""
        gc.collect()
        if self._device.type == "cuda":
            self._loaded = torch.cuda.memory_allocated(self._device)
            return
        _return_free_memory()
        reset_peak(self._device)
        self._loaded = peak_bytes(self._device)

    def ready(self, logps: Sequence[float]) -> None:
        """Tell the runner that the loop stands before its first step.

        Args:
            logps: log π(y|x) of the job's ``scored`` examples.
        """
        self.reply({"logps": list(logps), "loaded_bytes": self._loaded})

    def gate(self) -> None:
        """Pass, or end the turn and wait for the next; called before every optimizer step."""
        if self._taken == self._granted:
            if self._granted:
                self.finish()
            line = self._requests.readline()
            if not line:
                raise SystemExit(0)  # the runner wants no more
            self._granted, self._taken = int(line), 0
        if self._taken == min(self._lead_in, self._granted - 1):
            reset_peak(self._device)
            self._start = self._now()
        self._taken += 1

    def finish(self) -> None:
        """Report the turn that has just ended; `gate` calls it, and the arm after its last step."""
        seconds = self._now() - self._start
        self.reply(
            {
                "seconds": seconds,
                "peak_bytes": peak_bytes(self._device) - self._loaded,
                "total_bytes": peak_bytes(self._device),
                "losses": [float(loss) for loss in self.losses],
            }
        )
        self.losses.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the other arms share this GPU

    def reply(self, values: dict[str, Any]) -> None:
        """Send one line."""
        self._replies.write(json.dumps(values) + "\n")
        self._replies.flush()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _return_free_memory() -> None:
    """Hand freed heap back to the kernel: what loading left would hide what training adds."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
