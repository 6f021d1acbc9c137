"""Read rows as sides, a prompt and an answer each; `recognise` has the shapes of rows.

Once a row's shape is known, what is read here is
    ``{"chosen": text, "rejected": text}``, whole dialogues as HH-RLHF publishes them;
    ``{"prompt": …, "chosen": …, "rejected": …}``, the prompt apart or repeated by the answers;
    ``{"prompt": …, "responses": [best, …, worst]}``, k ≥ 2 answers in order of preference;
    ``{"messages": […]}``, and ``{"prompt": …, "completion": …}``.
Prompts, answers and dialogues are text, or lists of ``{"role": …, "content": …}`` messages (in
ShareGPT ``from`` and ``value``), which may say ``"weight": 0`` where they are not to be trained on.
In SFT ``"label": false`` says so of the row. `alignkit.data.text.fields` judges the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.data.text.dialogue import (
    ASSISTANT,
    Message,
    RowError,
    last_label,
    split_last,
    turns,
)
from alignkit.data.text.fields import is_set, truth_of, unread_columns
from alignkit.data.text.known_shapes import PREFERENCE, SFT
from alignkit.data.text.messages import as_messages, named, read_tools, transcript
from alignkit.data.text.recognise import readings, told
from alignkit.data.text.shape import Columns, Shape
from alignkit.data.text.speakers import usual_role

PREFERENCE_COLUMNS = frozenset(("prompt", "chosen", "rejected", "responses", "tools"))
SFT_COLUMNS = PREFERENCE_COLUMNS | {"messages", "completion", "label", "margin"}
"""The columns that are read, or rightly left: of ranked answers SFT takes the first."""


class Side(NamedTuple):
    r"""Hold one dialogue split into prompt and answer.

    Example:
        >>> Side("\n\nHuman: What is 2 + 2?\n\nAssistant:", " 4").reply.content
        '4'

    Attributes:
        prompt: As in `Dialogue`, as for ``starts`` and ``messages``.
        answer: As in `Dialogue`.
        starts: Where the prompt's turns begin, where the row said so.
        messages: The prompt as messages, where the row gave them.
        content: The answer as a message's content; ``None`` where it is part of one text.
        trained: Whether the answer may be trained on.
        whole: Whether prompt and answer were one text, as HH-RLHF publishes them.
        unread: What of the row would change what is trained, and is not read.
        fields: Of the answer, as in `Message`.
        continued: As in `Dialogue`, as for ``tools``.
        shape: The name of the shape that the row was read as.
        label: Whether the answer is good, of an unpaired row.
    """

    prompt: str
    answer: str
    starts: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    content: str | None = None
    trained: bool = True
    whole: bool = False
    unread: tuple[str, ...] = ()
    fields: str = ""
    continued: str = ""
    tools: str = ""
    shape: str = ""
    label: bool | None = None

    @property
    def reply(self) -> Message:
        """Return the answer as a message."""
        if self.content is None:
            said = (self.continued + self.answer).strip()
            return Message("assistant", said, self.trained, self.fields)
        return Message("assistant", self.content, self.trained, self.fields)


Sides = Callable[[Mapping[str, Any]], list[Side]]


def preference_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the sides of a preference row, the best first.

    Raises:
        RowError: A missing key, a value of the wrong type, a dialogue without ``Assistant:``.
    """
    return _one_reading(row, PREFERENCE, _preference_sides)


def sft_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the one side of a row that SFT trains on.

    Raises:
        RowError: As `preference_sides`.
    """
    return _one_reading(row, SFT, _sft_sides)


def with_label(side: Side, row: Mapping[str, Any]) -> Side:
    """Return a side of SFT with what KTO's ``label`` says, in words where it is text."""
    label = row.get("label")
    if not is_set(label):
        return side
    truth = truth_of(label)
    if truth is None:
        return side._replace(unread=(*side.unread, "`label` that is not true or false"))
    return side._replace(trained=side.trained and truth)


def columns_read(sides: Sides) -> frozenset[str] | None:
    """Return the columns that a reader reads; ``None`` for a user's own reader."""
    if sides is preference_sides:
        return PREFERENCE_COLUMNS
    return SFT_COLUMNS if sides is sft_sides else None


def _one_reading(row: Columns, shapes: tuple[Shape, ...], read: Sides) -> list[Side]:
    """Return a row's sides by the one shape it has, or by several that agree on them."""
    (shape, columns), *others = readings(row, shapes)
    sides = read(columns)
    for other, theirs in others:
        if not all(map(_says_no_more, read(theirs), sides)):
            raise RowError(
                f"the row may be read as {told(shape, other)} or as {told(other, shape)}, which "
                "differ; name the columns that are meant in data.columns"
            )
    return [side._replace(shape=shape.name) for side in sides]


def _says_no_more(other: Side, side: Side) -> bool:
    """Tell whether another reading has the same answer, to a prompt that this one's holds."""
    said = [other.prompt] if other.messages is None else [each.content for each in other.messages]
    lines = (line.strip() for text in said for line in text.splitlines())
    return other.answer == side.answer and all(line in side.prompt for line in lines)


def _preference_sides(row: Columns) -> list[Side]:
    if row.get("responses") is not None:
        responses = row["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise RowError("`responses` must be a list of two or more, best first")
        sides = [_joined(row["prompt"], response, "responses") for response in responses]
    elif row.get("prompt") is None:
        sides = [_whole(row[key], key) for key in ("chosen", "rejected")]
    else:
        sides = [_joined(row["prompt"], row[key], key) for key in ("chosen", "rejected")]
    return [_with_columns(side, row, PREFERENCE_COLUMNS) for side in sides]


def _sft_sides(row: Columns) -> list[Side]:
    return [with_label(_with_columns(_sft_side(row), row, SFT_COLUMNS), row)]


def _sft_side(row: Columns) -> Side:
    if row.get("messages") is not None:
        return _whole(row["messages"], "messages")
    prompt = row.get("prompt")
    if prompt is None:
        return _whole(row["chosen"], "chosen")
    key = next(key for key in ("completion", "chosen", "responses") if row.get(key) is not None)
    value = row[key]
    ranked = key == "responses" and isinstance(value, list) and value
    return _joined(prompt, value[0] if ranked else value, key)


def last_trained(side: Side) -> Side:
    """Shorten a side to the last answer to train on, where messages say which are."""
    if side.trained or side.messages is None:
        return side
    for at in range(len(side.messages) - 1, -1, -1):
        message = side.messages[at]
        if message.role == "assistant" and message.trained:
            before = side_of((*side.messages[:at], message))
            return before._replace(unread=side.unread, tools=side.tools)
    return side


def side_of(messages: Sequence[Message]) -> Side:
    """Return messages as a side, the last one its answer."""
    *asked, answer = messages
    prompt, starts = transcript(asked)
    side = Side(prompt, f" {answer.content}", starts, tuple(asked), answer.content, answer.trained)
    return side._replace(fields=answer.fields)


def _with_columns(side: Side, row: Mapping[str, Any], read: frozenset[str]) -> Side:
    if is_set(row.get("tools")):
        side = side._replace(tools=read_tools(row["tools"]))
    if row.keys() <= read:
        return side
    said = [side.prompt] if side.messages is None else [each.content for each in side.messages]
    return side._replace(unread=(*side.unread, *unread_columns(row, read, said)))


def _whole(value: Any, key: str) -> Side:
    """Split a whole dialogue, which holds prompt and answer in one."""
    if isinstance(value, str):
        try:
            return Side(*split_last(value), whole=True)
        except RowError as error:
            raise RowError(f"{error}; data.columns may name a `prompt` elsewhere") from None
    messages, unread = as_messages(value, key)
    if not messages or messages[-1].role != "assistant":
        raise RowError(f"`{key}` must end with a message of the assistant")
    return side_of(messages)._replace(unread=unread)


def _joined(prompt: Any, answer: Any, key: str) -> Side:
    """Return the side of a prompt and an answer that stand in two columns."""
    unread: tuple[str, ...] = ()
    answer = [answer] if isinstance(answer, Mapping) else answer
    if _repeats(prompt, answer):
        return _whole(answer, key)
    if isinstance(answer, str):
        text, reply = _spaced(answer), Message("assistant", _unspaced(answer))
    else:
        messages, unread = as_messages(answer, key)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise RowError(
                f"`{key}` must be text, one message of the assistant, or a conversation that "
                "repeats `prompt`"
            )
        (reply,) = messages
        text = f" {reply.content}"
    side = _asked(prompt)
    if side.continued:
        # The space that joins them is the answer's, or no token boundary would fall there.
        stem = side.continued.rstrip(" ")
        text = _spaced(side.continued[len(stem) :] + (answer if isinstance(answer, str) else text))
        prompt_text = side.prompt.removesuffix(side.continued) + stem
        side = side._replace(prompt=prompt_text, continued=stem)
        reply = reply._replace(content=stem + text)
    return side._replace(
        answer=text,
        content=reply.content,
        trained=reply.trained,
        fields=reply.fields,
        unread=tuple(dict.fromkeys((*side.unread, *unread))),
    )


def _repeats(prompt: Any, answer: Any) -> bool:
    """Tell whether an answer repeats its prompt, and so is the whole conversation.

    A prompt that is text is the conversation's first or last question.
    """
    if isinstance(answer, str):
        label = isinstance(prompt, str) and last_label(prompt) == len(prompt)
        return label and answer.startswith(prompt)
    if not isinstance(answer, list) or len(answer) < 2:
        return False
    before = [named(message) for message in answer[:-1] if isinstance(message, Mapping)]
    if isinstance(prompt, str):
        users = (each for each in before if usual_role(each.get("role")) == "user")
        asked = [each.get("content") for each in users]
        return prompt in (asked[:1] + asked[-1:])
    given = prompt if isinstance(prompt, list) else []
    return before == [named(each) for each in given if isinstance(each, Mapping)]


def _asked(prompt: Any) -> Side:
    """Return a prompt from a column of its own as a side without its answer."""
    if not isinstance(prompt, str):
        messages, unread = as_messages(prompt, "prompt")
        if messages and messages[-1].role == "assistant" and not messages[-1].fields:
            *messages_before, begun = messages
            text, starts = transcript(messages_before)
            asked = Side(f"{text} {begun.content}", "", starts, tuple(messages_before))
            return asked._replace(continued=begun.content, unread=unread)
        text, starts = transcript(messages)
        return Side(text, "", starts, messages, unread=unread)
    body = prompt.rstrip(" ")
    if last_label(body) == len(body):
        # The label's trailing space belongs to the answer, or no token boundary would fall there.
        return Side(body, "")
    spoken = turns(prompt)
    if len(spoken) > 1 and not prompt[: spoken[0].start].strip():
        role, words, _ = spoken[-1]
        if f"{role}:" == ASSISTANT:
            return Side(prompt, "", continued=words[int(words[:1] == " ") :])
    text, starts = transcript([Message("user", prompt)])
    return Side(text, "", starts, (Message("user", _unspaced(prompt)),))


def _spaced(answer: str) -> str:
    return answer if not answer or answer[0].isspace() else f" {answer}"


def _unspaced(text: str) -> str:
    """Return text as a message's content, without one space in front and any at its end.

    More than one space in front is an indentation, which stays.
    """
    joined = text[:1] == " " and not text[1:2].isspace()
    return text[int(joined) :].rstrip()
