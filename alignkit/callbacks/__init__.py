"""Lightning callbacks."""

from alignkit.callbacks.progress import ProgressBar

__all__ = ["ProgressBar"]
