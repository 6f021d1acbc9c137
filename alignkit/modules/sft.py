"""Stage 2: supervised fine-tuning."""

from alignkit.modules.language import LanguageModule


class SFTModule(LanguageModule):
    """Cross-entropy of the answer given its prompt; the prompt's own tokens carry no loss.

    Feed it an `HHSFTDataModule`: the chosen answers of HH-RLHF.
    """
