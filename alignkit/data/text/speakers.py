"""Give messages their usual form, whatever names a data set has for who speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_USUAL = frozenset(("system", "user", "assistant", "human", "gpt"))
_OTHERS = {
    **dict.fromkeys(("prompter", "instruction", "query", "question", "user_1"), "user"),
    **dict.fromkeys(
        ("chatgpt", "chat_gpt", "gpt4", "gpt-4", "gpt-3.5", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("claude", "llama", "ai", "bot", "chatbot", "model", "response"), "assistant"),
    **dict.fromkeys(("answer", "assistant_1", "starchat", "guanaco"), "assistant"),
    **dict.fromkeys(("system_prompt", "sys"), "system"),
}
"""Names of speakers besides the usual ones, and of those of tools, in small letters."""


def plain_messages(value: Any) -> Any:
    """Return messages with their usual roles; any other value is returned unchanged.

    Messages may come as a list, as one, as a list of exchanges (``input`` and ``output``), or as
    the columns of a table (``{"role": [...], "content": [...]}``), which is how the datasets
    library keeps a sequence of them.

    Example:
        >>> plain_messages({"from": ["Human", "bing"], "value": ["2 + 2?", "4"]})
        [{'from': 'user', 'value': '2 + 2?'}, {'from': 'assistant', 'value': '4'}]
    """
    if isinstance(value, Mapping):
        rows = _rows_of(value)
        return _plain(value) if rows is None else [_plain(each) for each in rows]
    if not isinstance(value, list):
        return value
    if all(isinstance(each, Mapping) and {"input", "output"} <= each.keys() for each in value):
        value = [message for each in value for message in _exchange(each)]
    if all(map(_is_plain, value)):
        return value
    return [_plain(each) for each in value]


def speaker(role: Any) -> Any:
    """Return the usual name of a role; an unknown role is returned unchanged."""
    if not isinstance(role, str) or role in _USUAL:
        return role
    name = role.strip().lower().rstrip(":")
    name = {"human": "user", "gpt": "assistant"}.get(name, name)
    return _OTHERS.get(name, name)


def _is_plain(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return True
    role = message.get("role")
    if role is None:
        role = message.get("from")
    return role is None or (isinstance(role, str) and role in _USUAL)


def _plain(message: Any) -> Any:
    """Return one message with its role by the usual name."""
    if _is_plain(message):
        return message
    key = "role" if message.get("role") is not None else "from"
    return {**message, key: speaker(message[key])}


def _rows_of(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of a table of messages; ``None`` where it is one message, or no table."""
    lists = {name: each for name, each in value.items() if each is not None}
    if not ({"role", "from"} & lists.keys()) or not all(
        isinstance(v, list) for v in lists.values()
    ):
        return None
    sizes = {len(each) for each in lists.values()}
    if len(sizes) != 1:
        return None
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _exchange(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a question and its answer as messages; other fields are the answer's."""
    others = {name: pair[name] for name in pair if name not in ("input", "output")}
    return [
        {"role": "user", "content": pair["input"]},
        {**others, "role": "assistant", "content": pair["output"]},
    ]
