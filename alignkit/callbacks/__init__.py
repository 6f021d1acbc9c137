"""Provide the Lightning callbacks for checkpoints, for a last validation and for the progress bar."""

from alignkit.callbacks.checkpoint import Checkpoint
from alignkit.callbacks.final_validation import FinalValidation
from alignkit.callbacks.progress import ProgressBar

__all__ = ["Checkpoint", "FinalValidation", "ProgressBar"]
