"""Compute the training losses from log-probabilities, as pure functions.

`language` holds the cross-entropy of LoRA language modelling and SFT, `preference` the losses
over pairs. Nothing here depends on a model, a batch or a trainer.
"""

from alignkit.objectives import language, preference

__all__ = ["language", "preference"]
