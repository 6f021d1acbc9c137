"""Which process of a run this one is, before the processes know one another."""

from __future__ import annotations

import os


def is_first_rank() -> bool:
    """Tell from what torchrun, SLURM or Lightning has put into the environment."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)
