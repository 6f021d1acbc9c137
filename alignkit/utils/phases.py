"""Give a sign of life from every phase of a command that takes more than two seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from alignkit.utils.ranks import is_first_rank

log = logging.getLogger(__name__)

AFTER_SECONDS = 2.0
"""How long a phase is silent."""
EVERY_SECONDS = 30.0
"""How often a phase that goes on is told again."""


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Log what goes on if the block takes long, again every while.

    Nothing is logged about a short block, nor on other ranks than the first. Where the alignkit
    logger is above INFO, as with ``--quiet``, nothing is logged at all.

    Args:
        what: What is being done, such as ``loading gpt2``.
    """
    ended = threading.Event()
    if not is_first_rank():
        yield
        return
    start = time.monotonic()
    threading.Thread(target=_tell, args=(what, start, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    seconds = time.monotonic() - start
    if seconds > EVERY_SECONDS:
        log.info("%s took %.0f s", what, seconds)


def is_quiet() -> bool:
    """Tell whether only warnings and results are to be shown, as with ``--quiet``."""
    return not logging.getLogger("alignkit").isEnabledFor(logging.INFO)


def _tell(what: str, start: float, ended: threading.Event) -> None:
    if ended.wait(AFTER_SECONDS):
        return
    log.info("%s …", what)
    while not ended.wait(EVERY_SECONDS):
        log.info("%s … %.0f s so far", what, time.monotonic() - start)
