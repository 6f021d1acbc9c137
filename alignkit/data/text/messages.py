"""Read messages from rows: roles, contents and tool calls, by whatever names they have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from alignkit.data.text.dialogue import ASSISTANT, HUMAN, Message, RowError
from alignkit.data.text.fields import is_set, read_weight
from alignkit.data.text.speakers import role_name, usual_role
from alignkit.data.text.thoughts import THOUGHTS

_CALLS = ("function_call", "tool_call")
"""ShareGPT's roles whose message is a call as JSON text."""

LABELS = {"user": HUMAN, "assistant": ASSISTANT, "tool": "Tool:"}
"""How a turn begins in HH-RLHF's form."""


def as_messages(value: Any, key: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Check messages, and list those of their fields that are not understood.

    Args:
        value: A list of mappings with ``role`` and ``content``, or ShareGPT's ``from`` and
            ``value``. A content is text, parts that are text, or null beside ``tool_calls``.
        key: The column, for errors.

    Raises:
        RowError: It is something else.
    """
    if not isinstance(value, list):
        raise RowError(f"`{key}` must be text or a list of messages, not {type(value).__name__}")
    messages: list[Message] = []
    unread: dict[str, None] = {}
    for each in value:
        if not isinstance(each, Mapping):
            raise RowError(f"`{key}` must hold messages with `role` and `content`")
        message, others = _as_message(named(each), key)
        unread.update(dict.fromkeys(others))
        if message.role == "system" and messages:
            if [each.role for each in messages] != ["system"]:
                raise RowError(f"`{key}` has a system message that is not the first")
            said = (messages.pop().content, message.content)  # the system's and the developer's
            message = message._replace(content="\n\n".join(filter(None, said)))
        messages.append(message)
    return tuple(messages), tuple(unread)


def named(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with the field names used here, where it has ShareGPT's."""
    if "from" not in message or "value" not in message or message.get("role") is not None:
        return message
    names = {"from": "role", "value": "content"}
    return {names.get(name, name): message[name] for name in message if name != "content"}


def transcript(messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
    """Convert messages to an HH-RLHF prompt, and return where its turns begin."""
    text = ""
    starts = []
    for message in messages:
        if message.role in LABELS:
            starts.append(len(text))
            text += f"\n\n{LABELS[message.role]} {message.content}"
        else:
            text += message.content
    starts.append(len(text))
    return f"{text}\n\n{ASSISTANT}", tuple(starts)


def read_tools(value: Any) -> str:
    """Return a row's tools as JSON, each ``{"type": "function", "function": {...}}``.

    Raises:
        RowError: They are no list of JSON objects, nor its text.
    """
    tools = _parsed(value, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("`tools` must be a list of JSON objects, or the text of one")
    whole = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
    return json.dumps(whole, ensure_ascii=False) if whole else ""


def _as_message(message: Mapping[str, Any], key: str) -> tuple[Message, list[str]]:
    """Return one message, and its fields that are not understood."""
    role = message.get("role")
    trained, others = read_weight(message)
    if not isinstance(role, str):
        beside = f" (beside {', '.join(others)})" if others else ""
        raise RowError(f"`{key}` has a message whose `role` or `content` is not text{beside}")
    speaker = usual_role(role)
    if speaker is None:
        raise RowError(f"`{key}` has the unknown role {role[:40]!r}")
    calls = _calls(message, key)
    content = message.get("content")
    if content is None and calls:
        content = ""
    elif isinstance(content, list):
        content = _joined_parts(content, key)
    if not isinstance(content, str):
        beside = f" (beside {', '.join(others)})" if others else ""
        raise RowError(f"`{key}` has a message whose `role` or `content` is not text{beside}")
    fields: dict[str, Any] = {}
    if role_name(role) in _CALLS:
        fields = {"content": "", "tool_calls": calls}
    elif calls:
        fields = {"content": message.get("content"), "tool_calls": calls}
        content = "\n".join(filter(None, [content, *map(_call_text, calls)]))
    if speaker == "assistant":
        fields |= {name: message[name] for name in THOUGHTS if is_set(message.get(name))}
    if speaker == "tool":
        fields = {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}
    told = json.dumps(fields, ensure_ascii=False) if fields else ""
    return Message(speaker, content, trained, told), others


def _calls(message: Mapping[str, Any], key: str) -> list[Any]:
    """Return the tool calls that a message makes, as OpenAI's ``tool_calls``."""
    role = message["role"]
    if role_name(role) in _CALLS:
        call = _parsed(message.get("content"), role)
        return [_as_call(each, key) for each in (call if isinstance(call, list) else [call])]
    calls = message.get("tool_calls")
    if is_set(calls):
        if usual_role(role) != "assistant":
            raise RowError(f"`{key}` has `tool_calls` in a message of the role {role[:40]!r}")
        parsed = _parsed(calls, "tool_calls")
        if not isinstance(parsed, list):
            raise RowError(f"`{key}` has `tool_calls` that are no list")
        return [_as_call(each, key) for each in parsed]
    if is_set(message.get("function_call")):
        return [_as_call(_parsed(message["function_call"], "function_call"), key)]
    return []


def _as_call(call: Any, key: str) -> dict[str, Any]:
    """Return a call as ``{"type": "function", "function": {"name": …, "arguments": …}}``."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"`{key}` has a call of a tool without a `name`")
    return dict(call) if "function" in call else {"type": "function", "function": dict(function)}


def _call_text(call: Mapping[str, Any]) -> str:
    """Return a call as text, for formats that have no place for calls."""
    function = call["function"]
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):  # it stays the text that it is
            arguments = json.loads(arguments)
    told = {"name": function["name"], "arguments": arguments}
    return json.dumps(told, ensure_ascii=False, default=str)


def _parsed(value: Any, name: str) -> Any:
    """Return a value, parsed as JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{name}` is no JSON ({str(error)[:60]})") from error


def _joined_parts(parts: Sequence[Any], key: str) -> str:
    """Return the text of a content that comes in parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise RowError(f"`{key}` has a content part of the type {str(kind)[:40]!r}, not text")
        texts.append(text)
    return "".join(texts)
