"""Tell the rank of this process before the processes of a run are connected."""

from __future__ import annotations

import os
import re

from alignkit.errors import AlignkitError

_NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "JSM_NAMESPACE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"),
)


def check_rank_variables() -> None:
    """Refuse what libraries would fail at as soon as they are imported.

    Raises:
        AlignkitError: A launcher's variable that counts processes holds no whole number.
    """
    for name in _NUMBERS:
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise AlignkitError(
                f"{name}={value!r} in the environment: must be a whole number, as a launcher such "
                f"as torchrun sets it; unset {name} to run one process"
            )


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
