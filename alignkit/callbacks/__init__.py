"""Lightning callbacks."""

from alignkit.callbacks.checkpoint import Checkpoint
from alignkit.callbacks.progress import ProgressBar

__all__ = ["Checkpoint", "ProgressBar"]
