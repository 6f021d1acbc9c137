"""Tell who speaks by whatever name a data set has for it, and list messages in whatever form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt", "sys"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction", "query", "question"), "user"),
    "user_1": "user",
    **dict.fromkeys(("assistant", "gpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("chatgpt", "chat_gpt", "gpt4", "gpt-4", "gpt-3.5", "bing"), "assistant"),
    **dict.fromkeys(("bard", "claude", "llama", "starchat", "guanaco"), "assistant"),
    **dict.fromkeys(("ai", "bot", "chatbot", "response", "answer", "assistant_1"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
"""Whose a message is, by the names that data sets have for it, in small letters."""


def role_name(role: str) -> str:
    """Return a role as `ROLES` spells it: ``"Human:"`` is ``human``."""
    return role.strip().lower().rstrip(":")


def usual_role(role: Any) -> str | None:
    """Return ``system``, ``user``, ``assistant`` or ``tool``; ``None`` for an unknown role.

    Example:
        >>> usual_role("Human:"), usual_role("bing"), usual_role("narrator")
        ('user', 'assistant', None)
    """
    return ROLES.get(role_name(role)) if isinstance(role, str) else None


def plain_messages(value: Any) -> Any:
    """Return messages as a list of them; any other value is returned unchanged.

    Messages may come as a list, as one, as a list of exchanges (``input`` and ``output``), or as
    the columns of a table (``{"role": [...], "content": [...]}``), which is how the datasets
    library keeps a sequence of them.

    Example:
        >>> plain_messages({"from": ["Human", "bing"], "value": ["2 + 2?", "4"]})
        [{'from': 'Human', 'value': '2 + 2?'}, {'from': 'bing', 'value': '4'}]
    """
    if isinstance(value, Mapping):
        rows = _rows_of(value)
        return value if rows is None else rows
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(each, Mapping) and {"input", "output"} <= each.keys() for each in value):
        return [message for each in value for message in _exchange(each)]
    return value


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
