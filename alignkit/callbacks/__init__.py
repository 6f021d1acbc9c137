"""Provide the Lightning callbacks for checkpoints, a final validation and progress."""

from alignkit.callbacks.checkpoint import Checkpoint
from alignkit.callbacks.final_validation import FinalValidation
from alignkit.callbacks.progress import ProgressBar

__all__ = ["Checkpoint", "FinalValidation", "ProgressBar"]
