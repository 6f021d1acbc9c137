"""Tell the rank of this process before the processes of a run are connected."""

from __future__ import annotations

import os
import re


def is_first_rank() -> bool:
    """Tell whether this is rank 0, by the environment that torchrun, SLURM or Lightning sets."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error only reports that the connection to another process was lost."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    lost = r"gloo|pair closure|Connection (closed|reset|refused)|Timed out waiting"
    return isinstance(error, RuntimeError) and re.search(lost, str(error)) is not None
