"""Read off a tokenizer its special tokens, its size and the tokens that it adds to a text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.errors import AlignkitError

_SAMPLE_TEXTS = ("a", "1", ".", "\u4e00", " ")


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a fast tokenizer puts before and after a text of its own accord.

    Raises:
        AlignkitError: It has no token for any of the sample texts.
    """
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for probe in _SAMPLE_TEXTS:
        encoding = backend.encode(probe, add_special_tokens=True)
        text = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        if text:
            return tuple(encoding.ids[: text[0]]), tuple(encoding.ids[text[-1] + 1 :])
    name = tokenizer.name_or_path or type(tokenizer).__name__
    raise AlignkitError(f"tokenizer {name}: it has no token for any of {', '.join(_SAMPLE_TEXTS)}")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokenizer's special tokens and their ids."""
    added = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **{str(token): index for token, index in named}}


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the special tokens that may end an answer: EOS, and all without another role."""
    others = ("bos_token", "unk_token", "pad_token", "mask_token", "cls_token")
    roles = {str(getattr(tokenizer, name, None)) for name in others} - {str(tokenizer.eos_token)}
    return tuple(token for token in special_tokens(tokenizer) if token not in roles)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one above the largest id that a tokenizer may give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def refuse_other_tokens(
    theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a reference whose tokenizer gives other ids than the policy's, called ``name``.

    Raises:
        AlignkitError: It does.
    """
    if theirs.get_vocab() != ours.get_vocab():
        raise AlignkitError(
            f"its tokenizer has other tokens than the policy's ({name}); the reference must read "
            "the same ids"
        )
