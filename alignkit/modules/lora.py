"""Stage 1: language modelling with low-rank adapters."""

from alignkit.modules.language import LanguageModule


class LoRAModule(LanguageModule):
    """Language modelling on plain text, by LoRA (arXiv:2106.09685) or in full (``lora: null``).

    Feed it an `OpenWebTextDataModule`: every document is a response to an empty prompt.
    """
