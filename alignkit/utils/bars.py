"""Progress bars of transformers, left out where they say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def without_bars(silent: bool = True) -> Iterator[None]:
    """Draw no bars within the block, and leave them as they were.

    Inside a notebook, a bar of tqdm under a live display of rich recurses without end.

    Args:
        silent: Whether to, so that a caller may decide.
    """
    silenced = silent and hf_logging.is_progress_bar_enabled()
    if silenced:
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if silenced:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
