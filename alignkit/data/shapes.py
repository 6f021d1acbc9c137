"""The shapes a row may have, each turned into one side or several: a prompt and an answer.

Preference rows:
    ``{"chosen": text, "rejected": text}``, whole dialogues as HH-RLHF publishes them;
    ``{"prompt": …, "chosen": …, "rejected": …}``, the prompt apart;
    ``{"prompt": …, "responses": [best, …, worst]}``, k ≥ 2 answers in order of preference.
Rows for SFT:
    any of the above (its first answer), ``{"messages": […]}``, or
    ``{"prompt": …, "completion": …}``.
Prompts, answers and dialogues are text, or lists of ``{"role": …, "content": …}`` messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.data.dialogue import ASSISTANT, HUMAN, RowError, split_last, turns

_LABELS = {
    "user": HUMAN,
    "human": HUMAN,
    "prompter": HUMAN,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
}


class Side(NamedTuple):
    """One dialogue split into prompt and answer; ``starts`` as in `Dialogue`."""

    prompt: str
    answer: str
    starts: tuple[int, ...] | None = None


def preference_sides(row: Mapping[str, Any]) -> list[Side]:
    """The sides of a preference row, the best first.

    Raises:
        RowError: A missing key, a value of the wrong type, a dialogue without ``Assistant:``.
    """
    if "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise RowError("`responses` must be a list of two or more, best first")
        return [_joined(_need(row, "prompt"), response, "responses") for response in responses]
    values = {key: _need(row, key) for key in ("chosen", "rejected")}
    if row.get("prompt") is None:
        return [_whole(value, key) for key, value in values.items()]
    return [_joined(row["prompt"], value, key) for key, value in values.items()]


def sft_sides(row: Mapping[str, Any]) -> list[Side]:
    """The one side of a row that SFT trains on.

    Raises:
        RowError: As `preference_sides`.
    """
    if row.get("messages") is not None:
        return [_whole(row["messages"], "messages")]
    prompt = row.get("prompt")
    if prompt is not None:
        for key in ("completion", "chosen", "responses"):
            if row.get(key) is not None:
                value = row[key]
                ranked = key == "responses" and isinstance(value, list) and value
                return [_joined(prompt, value[0] if ranked else value, key)]
    return [_whole(_need(row, "chosen"), "chosen")]


def _need(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        found = ", ".join(f"`{name}`" for name in list(row)[:5]) or "nothing"
        raise RowError(f"the row has no `{key}` (it has {found[:200]})")
    return row[key]


def _whole(value: Any, key: str) -> Side:
    """A whole dialogue, prompt and answer in one."""
    if isinstance(value, str):
        return Side(*split_last(value))
    messages = _messages(value, key)
    if not messages or messages[-1][0] != ASSISTANT:
        raise RowError(f"`{key}` must end with a message of the assistant")
    prompt, starts = _transcript(messages[:-1])
    return Side(prompt, f" {messages[-1][1]}", starts)


def _joined(prompt: Any, answer: Any, key: str) -> Side:
    """A prompt and an answer that came apart."""
    if not isinstance(answer, str):
        messages = _messages(answer, key)
        if len(messages) != 1 or messages[0][0] != ASSISTANT:
            raise RowError(f"`{key}` must be text or one message of the assistant")
        answer = f" {messages[0][1]}"
    if not isinstance(prompt, str):
        prompt, starts = _transcript(_messages(prompt, "prompt"))
        return Side(prompt, _spaced(answer), starts)
    body = prompt.rstrip(" ")
    if body.endswith(ASSISTANT) and turns(body):
        # The label's trailing space belongs to the answer, or no token boundary would fall there.
        return Side(body, _spaced(answer))
    text, starts = _transcript([(HUMAN, prompt)])
    return Side(text, _spaced(answer), starts)


def _spaced(answer: str) -> str:
    return answer if not answer or answer[0].isspace() else f" {answer}"


def _messages(value: Any, key: str) -> list[tuple[str, str]]:
    """Checked messages as (label, content); a system message has the label ``""``."""
    if not isinstance(value, list):
        raise RowError(f"`{key}` must be text or a list of messages, not {type(value).__name__}")
    messages: list[tuple[str, str]] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise RowError(f"`{key}` must hold messages with `role` and `content`")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"`{key}` has a message whose `role` or `content` is not text")
        if role != "system" and role not in _LABELS:
            raise RowError(f"`{key}` has the unknown role {role[:40]!r}")
        if role == "system" and messages:
            raise RowError(f"`{key}` has a system message that is not the first")
        messages.append((_LABELS.get(role, ""), content))
    return messages


def _transcript(messages: list[tuple[str, str]]) -> tuple[str, tuple[int, ...]]:
    """Messages as an HH-RLHF prompt that asks for an answer, and where its turns begin."""
    text = ""
    starts = []
    for label, content in messages:
        if label:
            starts.append(len(text))
            text += f"\n\n{label} {content}"
        else:
            text += content
    starts.append(len(text))
    return f"{text}\n\n{ASSISTANT}", tuple(starts)
