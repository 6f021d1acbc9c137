"""Train stage 1: language modelling with low-rank adapters."""

from alignkit.modules.language import LanguageModule


class LoRAModule(LanguageModule):
    """Train on plain text, with LoRA (arXiv:2106.09685) or in full (``lora: null``).

    Its data come from an `OpenWebTextDataModule`: each document is a response to an empty prompt.
    """
