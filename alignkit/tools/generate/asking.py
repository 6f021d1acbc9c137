"""Choose the text format of a question: that of training, unless the user gives another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from alignkit.data.text.chat_templates import own_template
from alignkit.models.text_format import TextFormat, TextKind

log = logging.getLogger(__name__)

DEFAULT_FORMAT = TextFormat("boundary", max_length=0)
"""The format for a model that does not store that of its training; its 0 sets no limit."""


def choose_format(
    trained: TextFormat | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    prompt_format: TextKind | None = None,
    system: str | None = None,
) -> TextFormat:
    """Return the text format to ask a model with, and warn where training used another.

    Args:
        trained: The text format of training; ``None`` if the model does not store it.
        tokenizer: The model's tokenizer.
        name: The model's name in the log.
        prompt_format: The user's choice; ``None`` for that of training, or for the tokenizer's
            chat template where the model does not say and there is one.
        system: The user's system message; ``None`` for that of training.
    """
    asked = trained or DEFAULT_FORMAT
    if trained is None and prompt_format is None and (template := own_template(tokenizer)):
        asked = TextFormat("chat", max_length=0, chat_template=template)
        log.info("%s: does not say how it was trained; asked by its chat template", name)
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
    """Warn once if prompts are longer, in tokens, than any that the model was trained on."""
    longer = [i for i, length in enumerate(lengths, start=1) if length > asked.max_length > 0]
    if longer:
        log.warning(
            "%s: %d of %d prompts (the first is prompt %d) are longer than max_length=%d, which "
            "it was trained with",
            name, len(longer), len(lengths), longer[0], asked.max_length,
        )  # fmt: skip
