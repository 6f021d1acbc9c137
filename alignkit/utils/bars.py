"""Turn the progress bars of transformers off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def without_bars(silent: bool = True) -> Iterator[None]:
    """Turn transformers' progress bars off within the block, and restore the setting after it.

    Inside a notebook, a bar of tqdm under a live display of rich recurses without end.

    Args:
        silent: Whether to turn them off; with ``False`` the block changes nothing.
    """
    silenced = silent and hf_logging.is_progress_bar_enabled()
    if silenced:
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if silenced:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
