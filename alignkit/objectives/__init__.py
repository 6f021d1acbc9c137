"""Objectives as pure functions: log-probabilities in, losses out, equations beside the code.

`language` holds the cross-entropy of LoRA language modelling and SFT, `preference` the losses
over pairs. Nothing here knows a model, a batch or a trainer.
"""

from alignkit.objectives import language, preference

__all__ = ["language", "preference"]
