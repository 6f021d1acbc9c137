"""Read what rows ask, prompts, instructions and conversations, with the system's message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.data.text.dialogue import RowError, last_label
from alignkit.data.text.fields import is_set
from alignkit.data.text.shape import Columns, Read
from alignkit.data.text.speakers import plain_messages, usual_role

SYSTEM = ("system", "system_prompt")
_INPUT = ("input", "context")


class Question(NamedTuple):
    """Hold one form of a question: its name, the columns that make it, and how it is read.

    Example:
        >>> riddle = Question("riddles", ("riddle",), asking("riddle"))
        >>> riddle.read({"riddle": "What has roots?"})
        {'prompt': [{'role': 'user', 'content': 'What has roots?'}]}
    """

    name: str
    needs: tuple[str, ...]
    read: Read
    also: tuple[str, ...] = SYSTEM


def system_of(row: Columns) -> list[dict[str, str]]:
    """Return the system's message, where a column holds one."""
    found = [row[name] for name in SYSTEM if is_set(row.get(name))]
    if len(found) > 1 and found[0] != found[1]:
        raise RowError("the row has both `system` and `system_prompt`; name one in data.columns")
    if not all(isinstance(each, str) for each in found):
        raise RowError("`system` must be text")
    return [{"role": "system", "content": each} for each in found[:1]]


def asking(column: str) -> Read:
    """Return a function that reads a column as the user's message, or as messages."""

    def read(row: Columns) -> dict[str, Any]:
        asked = plain_messages(row[column])
        spoken = isinstance(asked, list) and all(
            isinstance(each, Mapping) and ("role" in each or "from" in each) for each in asked
        )
        if spoken:
            return {"prompt": led(system_of(row), asked)}
        return {"prompt": [*system_of(row), {"role": "user", "content": asked}]}

    return read


def instruction(row: Columns) -> dict[str, Any]:
    """Read the instruction, and on the next line what it is about."""
    given = [row[name] for name in _INPUT if is_set(row.get(name))]
    if not all(isinstance(each, str) for each in (row["instruction"], *given)):
        raise RowError("`instruction` and `input` must be text")
    asked = "\n".join([row["instruction"], *given])
    return {"prompt": [*system_of(row), {"role": "user", "content": asked}]}


def prompt_of(row: Columns) -> dict[str, Any]:
    """Read a prompt as it is, or behind the system's message where a column holds one."""
    prompt = plain_messages(row["prompt"])
    if not (system := system_of(row)):
        return {"prompt": prompt}
    if not isinstance(prompt, str):
        return {"prompt": led(system, prompt)}
    body = prompt.rstrip(" ")
    if last_label(body) == len(body):  # HH-RLHF's form, in which it stands before the first turn
        return {"prompt": system[0]["content"] + prompt}
    return {"prompt": [*system, {"role": "user", "content": prompt}]}


def led(system: list[dict[str, str]], messages: Any) -> Any:
    """Return messages behind the system's, unless they begin with the same."""
    if not system or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if usual_role(first.get("role", first.get("from"))) != "system":
        return [*system, *messages]
    if first.get("content", first.get("value")) != system[0]["content"]:
        raise RowError("the row has a system message in a column and another in its messages")
    return messages


def talk(column: str) -> Read:
    """Return a function that reads a column as a whole conversation."""

    def read(row: Columns) -> dict[str, Any]:
        return {"messages": led(system_of(row), plain_messages(row[column]))}

    return read


def talk_asks(column: str) -> Read:
    """Return a function that reads a column as a conversation that ends with a question."""

    def read(row: Columns) -> dict[str, Any]:
        asked = talk(column)(row)["messages"]
        last = asked[-1] if isinstance(asked, list) and asked else None
        said = last.get("from", last.get("role")) if isinstance(last, Mapping) else None
        if usual_role(said) == "assistant":
            raise RowError(f"`{column}` ends with the answer that `chosen` should hold")
        return {"prompt": asked}

    return read


PROMPTS = Question("prompts", ("prompt",), prompt_of)
ALPACA = Question("Alpaca", ("instruction",), instruction, (*_INPUT, *SYSTEM))
QUESTIONS = tuple(
    Question(name, (column,), asking(column))
    for name, column in (("questions", "question"), ("queries", "query"), ("problems", "problem"))
)
TALKS = ("conversations", "conversation")
