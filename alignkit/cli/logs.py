"""Choose what of the libraries' log lines and warnings a user of the command reads."""

from __future__ import annotations

import logging
import sys
import warnings

# Warnings that a user of alignkit can do nothing about.
_IGNORED_WARNINGS = (
    # Lightning's own use of names that torch and jsonargparse have deprecated since.
    r"(?s).*treespec, LeafSpec",
    r"(?s).*skip_none parameter was deprecated",
    # The configuration was just saved there, or an earlier run's checkpoint lies there.
    r"Checkpoint directory .* exists and is not empty",
    # Our data loader is resumable: its sampler starts where the checkpoint stopped.
    r".*your dataloader is not resumable",
    # Our data modules do not define that hook, so the module's replaces nothing.
    r"You have overridden `on_before_batch_transfer`",
)


def log_unraisable(about: sys.UnraisableHookArgs) -> None:
    """Log at debug level what failed while an object was being deleted.

    Some of Lightning's profilers fail so a second time after their ``__init__`` was refused.
    """
    logging.getLogger("alignkit").debug("ignored: %r in %r", about.exc_value, about.object)


def configure_logs() -> None:
    """Show our own log lines, and hide those of Lightning that a user cannot act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("alignkit").setLevel(logging.INFO)
    # Messages that advertise other products.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
