"""Load models, make them lighter, identify them by content, and save and export them."""

from alignkit.models.load import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
