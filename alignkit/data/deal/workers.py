"""Prepare a data loader's worker process."""

from __future__ import annotations

import os

from lightning.fabric.utilities.seed import pl_worker_init_function

from alignkit.utils.interrupts import ignore_signals


def start_worker(worker: int) -> None:
    """Keep a worker alive for the batches that a stopping run still needs."""
    ignore_signals()
    if os.environ.get("PL_SEED_WORKERS") == "1":  # what Lightning does where there is no function
        pl_worker_init_function(worker)
