"""Train stage 2: supervised fine-tuning."""

from alignkit.modules.language import LanguageModule


class SFTModule(LanguageModule):
    """Train on answers given their prompts; the prompt's own tokens carry no loss.

    Its data come from an `HHSFTDataModule`: the chosen answers of HH-RLHF.
    """
