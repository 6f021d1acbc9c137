"""Choose what a command says beside its results, and where."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

# Warnings that a user of alignkit can do nothing about.
_IGNORED_WARNINGS = (
    # Lightning's own use of names that torch and jsonargparse have deprecated since.
    r"(?s).*treespec, LeafSpec",
    r"(?s).*skip_none parameter was deprecated",
    # The configuration was just saved there, or an earlier run's checkpoint lies there.
    r"Checkpoint directory .* exists and is not empty",
    # Without a validation there is no best checkpoint, as the end of a run says.
    r"(?s)`ModelCheckpoint\(monitor=.*could not find the monitored key",
    # Our data loader is resumable: its sampler starts where the checkpoint stopped.
    r".*your dataloader is not resumable",
    # Our data modules do not define that hook, so the module's replaces nothing.
    r"You have overridden `on_before_batch_transfer`",
)
# Loggers whose lines below WARNING only tell how a run goes.
_TALKATIVE = ("alignkit", "lightning", "lightning.pytorch", "lightning.fabric")


class _StandardError(logging.StreamHandler[TextIO]):
    """Write to whatever `sys.stderr` is at the time, as a progress bar replaces it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Return the stream of this moment."""
        return sys.stderr


def configure_logs(quiet: bool = False) -> None:
    """Show our own log lines, and hide those of Lightning that a user cannot act on.

    Args:
        quiet: Show warnings and errors alone.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StandardError()])
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        logger.handlers.clear()  # Lightning's own, which hold on to the stream of the start
        logger.propagate = True
    # Messages that advertise other products.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # On some processors it misses a package on every start, also where nothing has 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def log_unraisable(about: sys.UnraisableHookArgs) -> None:
    """Log at debug level what failed while an object was being deleted.

    Some of Lightning's profilers fail so a second time after their ``__init__`` was refused.
    """
    logging.getLogger("alignkit").debug("ignored: %r in %r", about.exc_value, about.object)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
