"""The shapes that rows come in, recognised by their columns, and the reading of each.

A reading is the same row in the columns that `alignkit.data.text.shapes` understands: a prompt,
messages and answers. Of the shapes whose columns a row has, those that need fewer of the same go;
where several are left and say different things, the row is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import is_set
from alignkit.errors import AlignkitError

Columns = Mapping[str, Any]

TEXT_COLUMNS = ("text", "content")
"""The columns that hold a document."""


class Shape(NamedTuple):
    """One shape of row.

    Attributes:
        name: What people call it, for one row or many.
        needs: The columns that make it.
        read: The columns of the same row that are understood, from those that it has.
        also: Columns that ``read`` takes where they are set.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Columns], dict[str, Any]] = lambda row: {}
    also: tuple[str, ...] = ()

    @property
    def columns(self) -> frozenset[str]:
        """All that it reads."""
        return frozenset((*self.needs, *self.also))


_SYSTEM = ("system", "system_prompt")
_INPUT = ("input", "context")
_SPOKEN = frozenset(("prompt", "messages", "completion", "chosen", "rejected", "responses"))
"""What is said in a row, in the columns that are understood."""


def _asked(row: Columns, text: str) -> list[dict[str, str]]:
    """A question as messages, after the system's where there is one."""
    system = [row[name] for name in _SYSTEM if is_set(row.get(name))]
    if len(system) > 1:
        raise RowError("the row has both `system` and `system_prompt`; name one in data.columns")
    return [{"role": "system", "content": each} for each in system] + [
        {"role": "user", "content": text}
    ]


def _prompt(row: Columns) -> dict[str, Any]:
    return {"prompt": row["prompt"]}


def _question(row: Columns) -> dict[str, Any]:
    return {"prompt": _asked(row, row["question"])}


def _instruction(row: Columns) -> dict[str, Any]:
    """The instruction, and on the next line what it is about."""
    given = [row[name] for name in _INPUT if is_set(row.get(name))]
    if not all(isinstance(each, str) for each in (row["instruction"], *given)):
        raise RowError("`instruction` and `input` must be text")
    return {"prompt": _asked(row, "\n".join([row["instruction"], *given]))}


def _conversation(row: Columns) -> dict[str, Any]:
    return {"messages": _with_system(row)}


def _with_system(row: Columns) -> Any:
    """ShareGPT's conversation, after the system's message where a column holds one."""
    spoken = row["conversations"]
    return [*_asked(row, "")[:-1], *spoken] if isinstance(spoken, list) else spoken


def _conversation_asks(row: Columns) -> dict[str, Any]:
    asked = _with_system(row)
    last = asked[-1] if isinstance(asked, list) and asked else None
    speaker = last.get("from", last.get("role")) if isinstance(last, Mapping) else None
    if speaker in ("gpt", "assistant"):
        raise RowError("`conversations` ends with the answer that `chosen` should hold")
    return {"prompt": asked}


def _answered(
    title: str,
    columns: tuple[str, ...],
    ask: Callable[[Columns], dict[str, Any]],
    answer: str,
    also: tuple[str, ...],
) -> Shape:
    """A shape whose question is read by ``ask`` and whose one answer stands in a column."""

    def read(row: Columns) -> dict[str, Any]:
        return {**ask(row), "completion": row[answer]}

    return Shape(title, (*columns, answer), read, also)


def _ranked(
    name: str, column: str, ask: Callable[[Columns], dict[str, Any]], also: tuple[str, ...] = ()
) -> dict[str, Shape]:
    """The shape of pairs, for preference training and for SFT, which takes the chosen answer."""

    def pair(row: Columns) -> dict[str, Any]:
        return {**ask(row), "chosen": row["chosen"], "rejected": row["rejected"]}

    def best(row: Columns) -> dict[str, Any]:
        return {**ask(row), "chosen": row["chosen"]}

    return {
        "preference": Shape(name, (column, "chosen", "rejected"), pair, also),
        "sft": Shape(name, (column, "chosen"), best, (*also, "rejected")),
    }


_PAIRS = (
    _ranked("ShareGPT preference pairs", "conversations", _conversation_asks, _SYSTEM),
    _ranked("Orca preference pairs", "question", _question, _SYSTEM),
    _ranked("Alpaca preference pairs", "instruction", _instruction, (*_INPUT, *_SYSTEM)),
)
_PROMPTED = Shape("prompts with chosen and rejected answers", ("prompt", "chosen", "rejected"))
_WHOLE = Shape("dialogues with chosen and rejected ends", ("chosen", "rejected"))
_LISTED = Shape("prompts with ranked responses", ("prompt", "responses"))

PREFERENCE = (_WHOLE, _PROMPTED, _LISTED, *(pair["preference"] for pair in _PAIRS))
"""Shapes with two answers or more to a prompt."""

SFT = (
    Shape("messages", ("messages",)),
    Shape("KTO messages", ("messages", "label")),
    Shape("prompts with completions", ("prompt", "completion")),
    Shape("KTO prompts with completions", ("prompt", "completion", "label")),
    *(
        _answered(f"prompts with {name}s", ("prompt",), _prompt, name, ())
        for name in ("response", "answer")
    ),
    _WHOLE._replace(needs=("chosen",), also=("rejected",)),
    _PROMPTED._replace(needs=("prompt", "chosen"), also=("rejected",)),
    _LISTED,
    Shape("ShareGPT conversations", ("conversations",), _conversation, _SYSTEM),
    *(
        _answered("Alpaca instructions", ("instruction",), _instruction, name, (*_INPUT, *_SYSTEM))
        for name in ("output", "response", "answer", "completion")
    ),
    *(
        _answered(f"questions with {name}s", ("question",), _question, name, _SYSTEM)
        for name in ("answer", "response")
    ),
    *(pair["sft"] for pair in _PAIRS),
)
"""Shapes with an answer to imitate."""


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """A map of columns as ``data.columns`` gives it; ``None`` where it names none.

    Raises:
        AlignkitError: A name that no shape has, or a column that stands for two.
    """
    known = {*TEXT_COLUMNS, "label", *_SPOKEN}
    known = known.union(*(shape.columns for shape in (*PREFERENCE, *SFT)))
    for name in columns or {}:
        if name not in known:
            raise AlignkitError(
                f"data.columns: nothing is read from `{name}`; give a name of "
                f"{', '.join(sorted(known))}, and the column that stands for it"
            )
    given = list((columns or {}).values())
    if doubled := next((each for each in given if given.count(each) > 1), None):
        raise AlignkitError(f"data.columns: `{doubled}` stands for two columns; name it once")
    return dict(columns) if columns else None


def renamed(row: Columns, columns: Mapping[str, str] | None) -> Columns:
    """A row by the names that are understood, where ``data.columns`` says what stands for them.

    Raises:
        RowError: A column that is named is missing.
    """
    if columns is None:
        return row
    for theirs in columns.values():
        if theirs not in row:
            raise RowError(f"the row has no `{theirs}`, which data.columns names ({_told(row)})")
    kept = {name: row[name] for name in row if name not in columns.values() and name not in columns}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


class Reading(NamedTuple):
    """A row in the columns that are understood, and the shape it came in."""

    shape: Shape
    row: Columns


def readings(row: Columns, shapes: tuple[Shape, ...]) -> list[Reading]:
    """The readings of a row, one for each shape it may be.

    Raises:
        RowError: It has none; the nearest shape is named with what is missing.
    """
    found = _matching(frozenset(name for name in row if is_set(row[name])), shapes)
    if not found:  # an empty answer is one all the same
        found = _matching(frozenset(name for name in row if row[name] is not None), shapes)
    if not found:
        raise RowError(_missing(row, shapes))
    return [Reading(shape, _canonical(row, shape)) for shape in found]


@lru_cache(maxsize=64)
def columns_of(name: str) -> frozenset[str]:
    """The columns that the shapes of a name read."""
    found = (shape.columns for shape in (*PREFERENCE, *SFT) if shape.name == name)
    return frozenset(column for columns in found for column in columns)


def kind_of(row: Columns) -> str:
    """What a row is for: ``preference``, ``sft`` or ``text``."""
    there = frozenset(name for name in row if row[name] is not None)
    if _matching(there, PREFERENCE) or {"rejected", "responses"} & row.keys():
        return "preference"
    if not _matching(there, SFT) and not there.isdisjoint(TEXT_COLUMNS):
        return "text"
    return "sft"


def document_of(row: Columns) -> str:
    """A row's document.

    Raises:
        RowError: It has none, or two.
    """
    texts = [name for name in TEXT_COLUMNS if isinstance(row.get(name), str)]
    if len(texts) > 1 and row["text"] != row["content"]:
        raise RowError("the row has `text` and `content`; name one in data.columns")
    if not texts:
        raise RowError(f"the row has no `text` ({_told(row)}){_elsewhere(row, SFT, 'an SFT')}")
    return str(row[texts[0]])


def _canonical(row: Columns, shape: Shape) -> Columns:
    read = shape.read(row)
    others = _SPOKEN - shape.columns
    gone = others | shape.columns if read else others
    kept = row if gone.isdisjoint(row) else {name: row[name] for name in row if name not in gone}
    return {**kept, **read} if read else kept


@lru_cache(maxsize=1024)
def _matching(there: frozenset[str], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    fitting = [shape for shape in shapes if there.issuperset(shape.needs)]
    return tuple(
        shape
        for shape in fitting
        if not any(set(shape.needs) < set(other.needs) for other in fitting)
    )


def _missing(row: Columns, shapes: tuple[Shape, ...]) -> str:
    there = frozenset(name for name in row if row[name] is not None)

    def near(shape: Shape) -> tuple[int, int]:
        """More of its columns first, then fewer missing."""
        present = len(there & shape.columns)
        return present, -len(set(shape.needs) - there)

    nearest = max(shapes, key=near)
    lacking = " and ".join(f"`{name}`" for name in nearest.needs if name not in there)
    told = f"the row has no {lacking} ({_told(row)}), to be read as {nearest.name}"
    other, kind = (SFT, "an SFT") if shapes is PREFERENCE else (PREFERENCE, "a preference")
    if elsewhere := _elsewhere(row, other, kind):
        return told + elsewhere
    if not there.isdisjoint(TEXT_COLUMNS):
        return f"{told}; as a document it is for a text data module"
    return f"{told}; data.columns may name others"


def _elsewhere(row: Columns, shapes: tuple[Shape, ...], kind: str) -> str:
    """Which other data module would read the row; empty for none."""
    there = frozenset(name for name in row if row[name] is not None)
    fitting = _matching(there, shapes)
    return f"; as {fitting[0].name} it is for {kind} data module" if fitting else ""


def _told(row: Columns) -> str:
    found = ", ".join(f"`{name}`" for name in list(row)[:8]) or "nothing"
    return f"it has {found[:200]}"
