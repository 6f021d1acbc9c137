"""Models as alignkit uses them: loaded, made lighter, named by content, kept and exported."""

from alignkit.models.load import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
