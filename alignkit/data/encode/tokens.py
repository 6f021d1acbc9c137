"""Encode text as token ids, in batches, the same way for training and generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import transformers
import xxhash
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerBase

from alignkit.data.read.hashes import add_file
from alignkit.errors import AlignkitError
from alignkit.models.text_format import SPECIALS, PromptFormat, TextKind
from alignkit.models.tokenizer import added_around


class TextEncoder:
    """Encode plain text with a fast tokenizer, without padding or truncation.

    Text is taken as text: ``<|endoftext|>`` written in a document becomes ordinary tokens, never
    an end of sequence in the middle of an answer.

    Args:
        tokenizer: A fast tokenizer with an EOS token.

    Attributes:
        eos: Id that ends every response and document.
        bos: Ids that the tokenizer puts before a text of its own accord; mostly one or none.

    Raises:
        AlignkitError: The tokenizer is not a fast one, has no EOS, or ends a text of its own
            accord with something else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise AlignkitError(f"tokenizer {self._name}: a fast one (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None:
            raise AlignkitError(f"tokenizer {self._name}: it has no EOS token to end responses")
        self.eos: int = tokenizer.eos_token_id
        self._backend: Any = tokenizer.backend_tokenizer
        self._take_text(specials=False)
        self.bos, after = added_around(tokenizer)
        if after not in ((), (self.eos,)):
            raise AlignkitError(
                f"tokenizer {self._name}: it ends a text with {tokenizer.decode(list(after))!r}, "
                f"but its EOS is {tokenizer.eos_token!r}; set eos_token in tokenizer_config.json"
            )

    def __call__(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Return the ids of each text, without BOS or EOS.

        Args:
            texts: Any number of texts, encoded in parallel.
            specials: Read special tokens written in the text as such, as chat templates need.
        """
        self._take_text(specials)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompts(self, texts: Sequence[str], kind: TextKind) -> list[list[int]]:
        """Return the ids of rendered prompts, as training and generation feed them to a model."""
        return [self.with_bos(ids, kind) for ids in self(texts, specials=kind in SPECIALS)]

    def with_bos(self, ids: list[int], kind: TextKind) -> list[int]:
        """Return a text's ids behind the BOS that is to precede them.

        A chat template writes its own BOS, or means none: transformers encodes what it renders
        without adding any. Raw text may have been rendered by one.
        """
        has_it = kind == "raw" and tuple(ids[: len(self.bos)]) == self.bos
        return ids if kind == "chat" or has_it else [*self.bos, *ids]

    def offsets(self, text: str, *, specials: bool = False) -> list[tuple[int, int]]:
        """Return where each token of a text begins and ends in it, in characters."""
        self._take_text(specials)
        found: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        return found

    def _take_text(self, specials: bool) -> None:
        """Reset what the tokenizer's last user left set; transformers sets it anew."""
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not specials

    @cached_property
    def fingerprint(self) -> str:
        """Hash everything that decides the ids.

        The tokenizer's files are hashed where it came from a directory, since writing a tokenizer
        out takes far longer than reading them. Otherwise the tokenizer itself is hashed. What may
        have been changed since it was read counts as it is now.
        """
        versions = f"{transformers.__version__} {tokenizers.__version__}"
        digest = xxhash.xxh3_128(f"{versions} {self.eos} {self.bos}".encode())
        directory = Path(self._name).expanduser()
        if directory.is_dir():
            for path in sorted(directory.iterdir()):
                if path.suffix in (".json", ".txt", ".model") and "index" not in path.name:
                    digest.update(path.name.encode())
                    add_file(digest, path)
            for name in ("normalizer", "pre_tokenizer", "post_processor"):
                part = getattr(self._backend, name)
                digest.update(part.__getstate__() if part is not None else name.encode())
            for number, added in self._backend.get_added_tokens_decoder().items():
                digest.update(f"{number} {added!r}".encode())
        else:
            digest.update(self._backend.to_str().encode())
        return digest.hexdigest()

    @cached_property
    def reads_words_apart(self) -> bool:
        r"""Tell whether text splits into words left to right, and each word into tokens alone.

        This holds for a byte-level BPE with GPT-2's pattern, which looks no further back than where
        a word begins and joins no line break to a letter after it. Then the tokens of a text from
        a line's first letter on depend on that letter and what follows alone, and a prompt's
        last line is enough to tell whether an answer changes the prompt's tokens.
        """
        backend = self._backend
        if not isinstance(backend.model, models.BPE) or backend.model.dropout is not None:
            return False
        if not (backend.normalizer is None or isinstance(backend.normalizer, normalizers.NFC)):
            return False
        if backend.pre_tokenizer is None:
            return False
        pattern = json.loads(backend.pre_tokenizer.__getstate__())
        steps = pattern["pretokenizers"] if pattern["type"] == "Sequence" else [pattern]
        byte_level = [step for step in steps if step["type"] == "ByteLevel"]
        return (
            len(byte_level) == 1
            and byte_level[0]["use_regex"]
            and not byte_level[0]["add_prefix_space"]
            and all(step["type"] in ("ByteLevel", "Digits") for step in steps)
            and not any(
                set(added.content) & set("\nAssistant:") and not added.special
                for added in backend.get_added_tokens_decoder().values()
            )
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt_format: PromptFormat = "boundary"
) -> list[int]:
    """Return the ids a prompt has in training, for generation to be fed the same.

    Args:
        tokenizer: A fast one.
        text: The prompt as its format renders it.
        prompt_format: Whether special tokens in the text are read as such, and who writes BOS.

    Returns:
        BOS where the tokenizer adds one and no template does, then the text's ids.
    """
    return TextEncoder(tokenizer).prompts([text], prompt_format)[0]
