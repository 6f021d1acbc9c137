"""A process of several ends as it was told to, whatever gloo's threads still do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignkit.__main__ import main

LEAVE = """
import atexit, sys, threading, time
import torch
import torch.distributed as dist
from alignkit.utils.leaving import leave_group

class Last:
    def __del__(self):
        print("the interpreter ended")

last = Last()
if {distributed}:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    dist.all_reduce(torch.ones(1))
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
leave_group(3)
sys.exit(4)
"""


@pytest.mark.parametrize(
    ("distributed", "status", "said"),
    [
        (True, 3, ["a thread", "at exit"]),
        (False, 4, ["a thread", "at exit", "the interpreter ended"]),
    ],
)
def test_what_is_due_at_exit_is_done_and_the_interpreter_is_not_ended(
    distributed: bool, status: int, said: list[str]
) -> None:
    code = LEAVE.format(distributed=distributed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (status, said), done.stderr


def test_the_command_leaves_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("alignkit.cli.main", lambda: 3)
    monkeypatch.setattr("alignkit.__main__.exit_on_signals", lambda: None)
    monkeypatch.setattr("alignkit.__main__.leave_group", left.append)
    assert main() == 3
    assert left == [3]
