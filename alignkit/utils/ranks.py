"""Which process of a run this one is, before the processes know one another."""

from __future__ import annotations

import os
import re


def is_first_rank() -> bool:
    """Tell from what torchrun, SLURM or Lightning has put into the environment."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error says no more than that another process of the run is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    lost = r"gloo|Connection (closed|reset|refused)|Timed out waiting"
    return isinstance(error, RuntimeError) and re.search(lost, str(error)) is not None
