"""How a model is asked: as it was trained, unless the user says otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from alignkit.data.text.chat_templates import own_template
from alignkit.models.text_format import TextFormat, TextKind

log = logging.getLogger(__name__)

PLAIN = TextFormat("boundary", max_length=0)
"""How a model is asked that says nothing of its training; no length is too long for it."""


def how_to_ask(
    trained: TextFormat | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    prompt_format: TextKind | None = None,
    system: str | None = None,
) -> TextFormat:
    """Settle how a model is asked, and say where that is not how it was trained.

    Args:
        trained: How it was trained; ``None`` where it says nothing.
        tokenizer: The model's.
        name: The model, for the log.
        prompt_format: What the user wants; ``None`` for as it was trained.
        system: The system message the user wants; ``None`` for the one it was trained with.
    """
    asked = trained or PLAIN
    if prompt_format not in (None, asked.prompt_format):
        if trained is not None and prompt_format != "raw":
            log.warning(
                "%s: trained with prompt_format=%s, asked with prompt_format=%s as you say",
                name, asked.prompt_format, prompt_format,
            )  # fmt: skip
        asked = replace(asked, prompt_format=prompt_format, chat_template=None)
    elif asked.chat_template not in (None, own_template(tokenizer)):
        log.warning(
            "%s: asked by the chat template it was trained with, which is not its tokenizer's",
            name,
        )
    if system is not None and system != (asked.system or ""):
        if trained is not None and trained.system is not None:
            log.warning("%s: trained with another system message, as every example had it", name)
        asked = replace(asked, system=system or None)
    return asked


def warn_of_length(lengths: Sequence[int], asked: TextFormat, name: str) -> None:
    """Say once that prompts are longer than any that the model was trained on."""
    longer = [i for i, length in enumerate(lengths, start=1) if length > asked.max_length > 0]
    if longer:
        log.warning(
            "%s: %d of %d prompts (the first is prompt %d) are longer than max_length=%d, which "
            "it was trained with",
            name, len(longer), len(lengths), longer[0], asked.max_length,
        )  # fmt: skip
