"""Text to token ids, the one way alignkit does it, in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from alignkit.errors import AlignkitError


class TextEncoder:
    """Encodes plain text with a private copy of a fast tokenizer.

    The copy neither truncates nor pads, whatever the original was last used for, and takes
    text as text: ``<|endoftext|>`` written in a document becomes ordinary tokens, never an end
    of sequence in the middle of an answer.

    Args:
        tokenizer: A fast tokenizer with an EOS token.

    Attributes:
        eos: Id that ends every response and document.
        bos: What the tokenizer puts before a text of its own accord: one id, or none.
        fingerprint: Hash of everything that decides the ids.

    Raises:
        AlignkitError: The tokenizer is not a fast one or has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise AlignkitError(f"tokenizer {name}: a fast one (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None:
            raise AlignkitError(f"tokenizer {name}: it has no EOS token to end responses with")
        self.eos: int = tokenizer.eos_token_id
        backend: Any = tokenizer.backend_tokenizer
        self._content: str = backend.to_str()
        if backend.truncation or backend.padding:
            content = json.loads(self._content) | {"truncation": None, "padding": None}
            self._content = json.dumps(content, ensure_ascii=False)
        self._backend: Tokenizer | None = None
        probe: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
        plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        lead = max((i for i in range(len(probe)) if probe[i : i + len(plain)] == plain), default=0)
        self.bos: tuple[int, ...] = tuple(probe[:lead])
        settings = f"{self._content}|{self.eos}|{self.bos}"
        self.fingerprint = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()

    def __call__(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Ids of each text, without BOS or EOS.

        Args:
            texts: Any number of texts, encoded in parallel.
            specials: Read special tokens written in the text as such, as chat templates need.
        """
        if self._backend is None:
            self._backend = Tokenizer.from_str(self._content)
        self._backend.encode_special_tokens = not specials
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids a prompt has in training, for generation to be fed the same.

    Returns:
        BOS where the tokenizer adds one, then the text's ids.
    """
    encoder = TextEncoder(tokenizer)
    return [*encoder.bos, *encoder([text])[0]]
