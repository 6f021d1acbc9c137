"""Give the chat template of a tokenizer, and templates that write our other formats."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignkit.models.text_format import TextFormat
from alignkit.models.tokenizer import added_around

_BOUNDARY_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_STRIPPED_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant: ' }}{% endif %}"
)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that a tokenizer uses by default; ``None`` without one."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # none, or several and no default among them
        return None


def template_of(text_format: TextFormat, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a chat template that renders prompts as a model was trained on them.

    Returns:
        The one of ``chat``; for ``boundary`` and ``stripped`` one that writes HH-RLHF's labels,
        behind what the tokenizer puts before a text; ``None`` for formats without roles.
    """
    if text_format.prompt_format == "chat":
        return text_format.chat_template
    body = {"boundary": _BOUNDARY_TEMPLATE, "stripped": _STRIPPED_TEMPLATE}.get(
        text_format.prompt_format
    )
    if body is None:
        return None
    bos = "".join(tokenizer.convert_ids_to_tokens(list(added_around(tokenizer)[0])))
    return (f"{{{{ {bos!r} }}}}" if bos else "") + body
