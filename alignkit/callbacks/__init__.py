"""Provide the Lightning callbacks for checkpoints and for the progress bar."""

from alignkit.callbacks.checkpoint import Checkpoint
from alignkit.callbacks.progress import ProgressBar

__all__ = ["Checkpoint", "ProgressBar"]
