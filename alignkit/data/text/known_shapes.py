"""List the shapes that rows come in: the columns that make each, and how they are read.

To add one, add an entry to `PREFERENCE` or `SFT` below. What it reads is the same row in the
columns of `SPOKEN`, which `alignkit.data.text.shapes` understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignkit.data.text.dialogue import RowError, last_label
from alignkit.data.text.fields import is_set
from alignkit.data.text.ranked import RANKS, SCORES, best_first
from alignkit.data.text.speakers import plain_messages, usual_role

Columns = Mapping[str, Any]
Read = Callable[[Columns], dict[str, Any]]


class Shape(NamedTuple):
    """Describe one shape of row: its name, its columns, and how it is read.

    Example:
        >>> shape = Shape("riddles", ("riddle", "solution"),
        ...               lambda row: {"prompt": row["riddle"], "completion": row["solution"]})
        >>> sorted(shape.columns)
        ['riddle', 'solution']

    Attributes:
        name: What people call it, for one row or many.
        needs: The columns that make it.
        read: The columns of the same row that are understood, from those that it has.
        also: Columns that ``read`` takes where they are set.
    """

    name: str
    needs: tuple[str, ...]
    read: Read = lambda row: {}
    also: tuple[str, ...] = ()

    @property
    def columns(self) -> frozenset[str]:
        """Return all columns that the shape reads."""
        return frozenset((*self.needs, *self.also))


class Shapes(tuple[Shape, ...]):
    """List shapes, known as a key by the list itself: to hash a hundred takes longer than a row.

    Example:
        >>> shapes = Shapes([Shape("riddles", ("riddle", "solution"))])
        >>> shapes[0].name, shapes == Shapes(shapes)
        ('riddles', False)
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


SPOKEN = frozenset(("prompt", "messages", "completion", "chosen", "rejected", "responses"))
"""What is said in a row, in the columns that are understood."""

_SYSTEM = ("system", "system_prompt")
_INPUT = ("input", "context")


class _Question(NamedTuple):
    """Hold one form of a question: its name, the columns that make it, and how it is read."""

    name: str
    needs: tuple[str, ...]
    read: Read
    also: tuple[str, ...] = _SYSTEM


def _system(row: Columns) -> list[dict[str, str]]:
    """Return the system's message, where a column holds one."""
    found = [row[name] for name in _SYSTEM if is_set(row.get(name))]
    if len(found) > 1 and found[0] != found[1]:
        raise RowError("the row has both `system` and `system_prompt`; name one in data.columns")
    if not all(isinstance(each, str) for each in found):
        raise RowError("`system` must be text")
    return [{"role": "system", "content": each} for each in found[:1]]


def _asking(column: str) -> Read:
    """Return a function that reads a column as the user's message."""

    def read(row: Columns) -> dict[str, Any]:
        return {"prompt": [*_system(row), {"role": "user", "content": row[column]}]}

    return read


def _instruction(row: Columns) -> dict[str, Any]:
    """Read the instruction, and on the next line what it is about."""
    given = [row[name] for name in _INPUT if is_set(row.get(name))]
    if not all(isinstance(each, str) for each in (row["instruction"], *given)):
        raise RowError("`instruction` and `input` must be text")
    asked = "\n".join([row["instruction"], *given])
    return {"prompt": [*_system(row), {"role": "user", "content": asked}]}


def _prompt(row: Columns) -> dict[str, Any]:
    """Read a prompt as it is, or behind the system's message where a column holds one."""
    prompt = plain_messages(row["prompt"])
    if not (system := _system(row)):
        return {"prompt": prompt}
    if not isinstance(prompt, str):
        return {"prompt": _led(system, prompt)}
    body = prompt.rstrip(" ")
    if last_label(body) == len(body):  # HH-RLHF's form, in which it stands before the first turn
        return {"prompt": system[0]["content"] + prompt}
    return {"prompt": [*system, {"role": "user", "content": prompt}]}


def _led(system: list[dict[str, str]], messages: Any) -> Any:
    """Return messages behind the system's, unless they begin with the same."""
    if not system or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if usual_role(first.get("role", first.get("from"))) != "system":
        return [*system, *messages]
    if first.get("content", first.get("value")) != system[0]["content"]:
        raise RowError("the row has a system message in a column and another in its messages")
    return messages


def _talk(column: str) -> Read:
    """Return a function that reads a column as a whole conversation."""

    def read(row: Columns) -> dict[str, Any]:
        return {"messages": _led(_system(row), plain_messages(row[column]))}

    return read


def _talk_asks(column: str) -> Read:
    """Return a function that reads a column as a conversation that ends with a question."""

    def read(row: Columns) -> dict[str, Any]:
        asked = _talk(column)(row)["messages"]
        last = asked[-1] if isinstance(asked, list) and asked else None
        said = last.get("from", last.get("role")) if isinstance(last, Mapping) else None
        if usual_role(said) == "assistant":
            raise RowError(f"`{column}` ends with the answer that `chosen` should hold")
        return {"prompt": asked}

    return read


_PROMPTS = _Question("prompts", ("prompt",), _prompt)
_ALPACA = _Question("Alpaca", ("instruction",), _instruction, (*_INPUT, *_SYSTEM))
_QUESTIONS = tuple(
    _Question(name, (column,), _asking(column))
    for name, column in (("questions", "question"), ("queries", "query"), ("problems", "problem"))
)
_TALKS = ("conversations", "conversation")


def _answered(name: str, question: _Question, answer: str) -> Shape:
    """Return the shape of a question whose one answer stands in a column."""

    def read(row: Columns) -> dict[str, Any]:
        return {**question.read(row), "completion": plain_messages(row[answer])}

    return Shape(name, (*question.needs, answer), read, question.also)


def _pair(name: str, question: _Question, better: str, worse: str) -> dict[str, Shape]:
    """Return the shape of pairs, for preference training and for SFT, which takes the better."""

    def answer(row: Columns, column: str) -> Any:
        said = plain_messages(row[column])
        repeats = isinstance(said, list) and len(said) > 1
        return _led(_system(row), said) if repeats and "system" in question.also else said

    def pair(row: Columns) -> dict[str, Any]:
        asked = question.read(row)
        return {**asked, "chosen": answer(row, better), "rejected": answer(row, worse)}

    def best(row: Columns) -> dict[str, Any]:
        return {**question.read(row), "chosen": answer(row, better)}

    return {
        "preference": Shape(name, (*question.needs, better, worse), pair, question.also),
        "sft": Shape(name, (*question.needs, better), best, (*question.also, worse)),
    }


def _chosen_by(name: str, asked: str, one: str, other: str, says: str) -> Shape:
    """Return the shape of two answers with a column that says which is the better one."""

    def read(row: Columns) -> dict[str, Any]:
        number = row[says]
        if isinstance(number, bool) or str(number) not in ("0", "1"):
            raise RowError(f"`{says}` must be 0 or 1")
        first = str(number) == ("1" if asked == "history" else "0")
        better, worse = (one, other) if first else (other, one)
        ask = _prompt(row) if asked == "prompt" else _asking(asked)(row)
        return {**ask, "chosen": row[better], "rejected": row[worse]}

    return Shape(name, (asked, one, other, says), read)


def _ranked(question: _Question, answers: str, numbers: str | None = None) -> Shape:
    """Return the shape of answers in order, or with a score or a rank for each."""

    def read(row: Columns) -> dict[str, Any]:
        given = row[numbers] if numbers else None
        ordered = best_first(row[answers], given, lower_is_better=numbers in RANKS)
        return {**question.read(row), "responses": ordered}

    needs = (*question.needs, answers, *([numbers] if numbers else []))
    scored = "scored" if numbers else "ranked"
    asked = question.name if question.name == "prompts" else "questions"
    name = f"{asked} with {scored} responses"
    return Shape(name, needs, read, question.also)


_BETTER = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("chosen_response", "rejected_response"),
    ("positive", "negative"),
    ("preferred", "dispreferred"),
)
"""Columns that hold the better and the worse answer."""

_BETTER_NAMES = {each: f"{each} with better and worse answers" for each in ("prompts", "questions")}


def _pairs_of(question: _Question, *names: str) -> list[dict[str, Shape]]:
    """Return the shapes of pairs for one way to ask, the first of them by a name of its own."""
    return [
        _pair(
            names[index > 0],
            question,
            better,
            worse,
        )
        for index, (better, worse) in enumerate(_BETTER)
    ]


_WHOLE = Shape("dialogues with chosen and rejected ends", ("chosen", "rejected"))
_PAIRS = (
    *_pairs_of(_PROMPTS, "prompts with chosen and rejected answers", _BETTER_NAMES["prompts"]),
    *(
        _pair("ShareGPT preference pairs", _Question("", (each,), _talk_asks(each)), *_BETTER[0])
        for each in _TALKS
    ),
    *_pairs_of(_QUESTIONS[0], "Orca preference pairs", _BETTER_NAMES["questions"]),
    *(
        pair
        for question in _QUESTIONS[1:]
        for pair in _pairs_of(question, *[_BETTER_NAMES["questions"]] * 2)
    ),
    *_pairs_of(_ALPACA, *["Alpaca preference pairs"] * 2),
)
_RANKED = tuple(
    shape
    for question in (_PROMPTS, *_QUESTIONS, _ALPACA)
    for answers in ("responses", "completions", "answers")
    for shape in (
        _ranked(question, answers),
        *(_ranked(question, answers, numbers) for numbers in (*SCORES, *RANKS)),
    )
)
_CHOSEN = (
    _chosen_by("prompts with two responses and the better one's number", "prompt", "response_0",
               "response_1", "better_response_id"),
    _chosen_by("SHP preference pairs", "history", "human_ref_A", "human_ref_B", "labels"),
)  # fmt: skip

PREFERENCE = Shapes((_WHOLE, *(pair["preference"] for pair in _PAIRS), *_RANKED, *_CHOSEN))
"""Shapes with two answers or more to a prompt."""

_INPUTS = _Question("inputs", ("input",), _asking("input"))
SFT = Shapes(
    (
        Shape("messages", ("messages",), _talk("messages"), _SYSTEM),
        Shape("KTO messages", ("messages", "label"), _talk("messages"), _SYSTEM),
        _answered("prompts with completions", _PROMPTS, "completion"),
        _answered("KTO prompts with completions", _PROMPTS, "completion")._replace(
            needs=("prompt", "completion", "label")
        ),
        *(_answered(f"prompts with {each}s", _PROMPTS, each) for each in ("response", "answer")),
        _WHOLE._replace(needs=("chosen",), also=("rejected",)),
        *(Shape("ShareGPT conversations", (each,), _talk(each), _SYSTEM) for each in _TALKS),
        *(
            _answered("Alpaca instructions", _ALPACA, each)
            for each in ("output", "response", "answer", "completion")
        ),
        # With an input it is no question of its own.
        _answered("Alpaca instructions", _ALPACA, "output")._replace(
            needs=("instruction", "input", "output"), also=("context", *_SYSTEM)
        ),
        *(
            _answered("questions with answers", question, each)
            for question in _QUESTIONS
            for each in ("answer", "response", "completion", "output", "solution")
        ),
        *(_answered("inputs with outputs", _INPUTS, each) for each in ("output", "response")),
        *(pair["sft"] for pair in _PAIRS),
        *_RANKED,
        *_CHOSEN,
    )
)
"""Shapes with an answer to imitate."""
