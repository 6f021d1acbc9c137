"""Recognise the shape of a row by its columns, and read the row accordingly.

A reading is the same row in the columns that `alignkit.data.text.shapes` understands: a prompt,
messages and answers. Of the shapes whose columns a row has, those that need fewer of the same go;
where several are left and say different things, the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import is_set
from alignkit.data.text.known_shapes import PREFERENCE, SFT
from alignkit.data.text.ranked import SAMPLED
from alignkit.data.text.shape import SPOKEN, Columns, Shape, Shapes
from alignkit.data.text.speakers import plain_messages
from alignkit.errors import AlignkitError

TEXT_COLUMNS = ("text", "content")
"""The columns that hold a document."""


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return a map of columns as ``data.columns`` gives it; ``None`` where it names none.

    Raises:
        AlignkitError: A name that no shape has, or a column that stands for two.
    """
    if not columns:
        return None
    known = {*TEXT_COLUMNS, "label", *SPOKEN}
    known = known.union(*(shape.columns for shape in (*PREFERENCE, *SFT)))
    for name in columns:
        if name not in known:
            raise AlignkitError(
                f"data.columns: nothing is read from `{name}`; give a name of "
                f"{', '.join(sorted(known))}, and the column that stands for it"
            )
    given = list(columns.values())
    if doubled := next((each for each in given if given.count(each) > 1), None):
        raise AlignkitError(f"data.columns: `{doubled}` stands for two columns; name it once")
    return dict(columns)


def renamed(row: Columns, columns: Mapping[str, str] | None) -> Columns:
    """Return a row by the names that are understood, as ``data.columns`` says what stands for each.

    Raises:
        RowError: A column that is named is missing.
    """
    if columns is None:
        return row
    for theirs in columns.values():
        if theirs not in row:
            raise RowError(f"the row has no `{theirs}`, which data.columns names ({_told(row)})")
    taken = {*columns, *columns.values()}
    kept = {name: row[name] for name in row if name not in taken}
    others = _others(frozenset(columns), frozenset((*kept, *columns)))
    kept = {name: value for name, value in kept.items() if name not in others}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


@lru_cache(maxsize=64)
def _others(named: frozenset[str], there: frozenset[str]) -> frozenset[str]:
    """Return the columns that make other shapes than those with the columns that are named."""
    shapes = (*PREFERENCE, *SFT)
    needed = frozenset(name for shape in shapes for name in shape.needs)
    meant = [
        shape
        for shape in shapes
        if named & needed <= frozenset(shape.needs) and there.issuperset(shape.needs)
    ]
    if not meant or not named & needed:
        return frozenset()
    read = frozenset(name for shape in meant for name in shape.columns)
    return needed - named - read - {"label", "tools"}


def readings(row: Columns, shapes: tuple[Shape, ...]) -> list[tuple[Shape, Columns]]:
    """Return the readings of a row: each shape it may be, with the row in the usual columns.

    Example:
        >>> ((shape, row),) = readings({"question": "2 + 2?", "answer": "4"}, SFT)
        >>> shape.name, row
        ('questions with answers', {'prompt': [{'role': 'user', 'content': '2 + 2?'}],
        'completion': '4'})

    Raises:
        RowError: It has none; the nearest shape is named with what is missing.
    """
    found = _matching(frozenset(name for name in row if is_set(row[name])), shapes)
    if not found:  # an empty answer is one all the same
        found = _matching(frozenset(name for name in row if row[name] is not None), shapes)
    if not found:
        raise RowError(_missing(row, shapes))
    return [(shape, _canonical(row, shape)) for shape in found]


_ALL = Shapes((*PREFERENCE, *SFT))


@lru_cache(maxsize=64)
def columns_of(name: str) -> frozenset[str]:
    """Return the columns that the shapes of a name read."""
    found = (shape.columns for shape in (*PREFERENCE, *SFT) if shape.name == name)
    return frozenset(column for columns in found for column in columns)


def told(shape: Shape, other: Shape) -> str:
    """Return a shape's name, with its columns where the other one has the same name."""
    names = ", ".join(f"`{name}`" for name in shape.needs)
    return f"{shape.name} ({names})" if shape.name == other.name else shape.name


def kind_of(row: Columns) -> str:
    """Tell what a row is for: ``preference``, ``sft`` or ``text``."""
    there = frozenset(name for name in row if row[name] is not None)
    pairs = set(PREFERENCE).intersection(_matching(there, _ALL))
    if pairs or {"rejected", "responses"} & row.keys():
        return "preference"
    if not _matching(there, SFT) and not there.isdisjoint(TEXT_COLUMNS):
        return "text"
    return "sft"


def document_of(row: Columns) -> str:
    """Return a row's document.

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
    """Return a row with the usual names of its columns and speakers.

    Raises:
        RowError: A column that holds a text elsewhere holds a yes or a no.
    """
    read = shape.read(row)
    others = SPOKEN - shape.columns
    gone = others | (shape.columns - {"label"}) if read else others
    for name in sorted(others.intersection(row)):
        if isinstance(row[name], bool):  # a verdict on the answer, under the name of one
            raise RowError(f"`{name}` is {row[name]}, not a text; an answer's verdict is `label`")
    kept = row if gone.isdisjoint(row) else {name: row[name] for name in row if name not in gone}
    found = {**kept, **read} if read else kept
    spoken = {name: found[name] for name in SPOKEN if isinstance(found.get(name), list | dict)}
    plain = {name: plain_messages(value) for name, value in spoken.items()}
    return {**found, **plain} if plain != spoken else found


@lru_cache(maxsize=1024)
def _matching(there: frozenset[str], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    fitting = [shape for shape in shapes if there.issuperset(shape.needs)]
    most = [
        shape
        for shape in fitting
        if not any(set(shape.needs) < set(other.needs) for other in fitting)
    ]
    return tuple(shape for shape in most if not shape.last) or tuple(most)


def _missing(row: Columns, shapes: tuple[Shape, ...]) -> str:
    there = frozenset(name for name in row if row[name] is not None)
    if SAMPLED in there:
        return f"nobody has ranked its `{SAMPLED}` yet: run alignkit judge FILE --output RANKED"

    def near(shape: Shape) -> tuple[int, int]:
        """Return a sort key: the most columns of a shape present, then the fewest missing."""
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
    example = ", ".join(f'"{name}": "…"' for name in nearest.needs if name not in there)
    return f"{told}; name yours by --data.columns '{{{example}}}' (--columns of audit and judge)"


def _elsewhere(row: Columns, shapes: tuple[Shape, ...], kind: str) -> str:
    """Tell which other data module would read the row; empty for none."""
    there = frozenset(name for name in row if row[name] is not None)
    fitting = _matching(there, shapes)
    if not fitting:
        return ""
    named = fitting[0].name
    if named.startswith("KTO"):
        return f"; as {named} it is for KTOModule with UnpairedDataModule"
    return f"; as {named} it is for {kind} data module"


def _told(row: Columns) -> str:
    found = ", ".join(f"`{name}`" for name in list(row)[:8]) or "nothing"
    return f"it has {found[:200]}"
