"""Docstrings for a stranger: each begins with a plain sentence, and every example runs."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignkit

HOME = Path(alignkit.__file__).parent
# How a docstring may begin: what the thing does, in the imperative.
VERBS = """
    Adapt Add Aggregate Align Apply Ask Attend Audit Begin Build Cast Check Choose Clear Clip
    Close Collect Compare Compile Compute Connect Continue Convert Copy Count Decide Declare Define
    Describe Divide Do Draw Encode End Exclude Exit Explain Find Flush Forget Generate Give
    Handle Hash Hold Ignore Install Keep Lay Let Limit List Load Log Look Make Measure Merge
    Minimise Move Multiply Normalise Open Parse Prepare Print Provide Put Query Raise Read
    Rebuild Recognise Record Refresh Refuse Register Remove Render Replace Report Reset Restart
    Restore Restrict Return Rewind Run Save Scale Score Set Shorten Show Split Stand Start Stay Stop
    Store Sum Take Tell Track Train Turn Undo Unpack Warn Write Yield
    """
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def sources() -> list[Path]:
    return sorted(HOME.rglob("*.py"))


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the docstring of a module, of its classes and of its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            name = getattr(node, "name", "")
            yield f"{path.relative_to(HOME)}:{getattr(node, 'lineno', 1)} {name}", text


def module_name(path: Path) -> str:
    parts = ("alignkit", *path.relative_to(HOME).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def with_examples() -> list[str]:
    found = (any(">>> " in text for _, text in docstrings(path)) for path in sources())
    return [module_name(path) for path, has in zip(sources(), found, strict=True) if has]


def test_the_first_line_of_a_docstring_is_a_plain_sentence() -> None:
    wrong = []
    for path in sources():
        for place, text in docstrings(path):
            first = text.splitlines()[0]
            if first.split()[0] not in VERBS.split() or not first.endswith("."):
                wrong.append(f"{place}: {first}")
    assert not wrong, "\n".join(["begin with a verb of VERBS and end with a full stop:", *wrong])


def carries_data(node: ast.AST) -> bool:
    """Whether a class is a public dataclass or named tuple, and no function with parameters."""
    if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
        return False
    marks = [ast.unparse(each) for each in (*node.decorator_list, *node.bases)]
    methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
    return "__call__" not in methods and any(
        mark.startswith("dataclass") or mark == "NamedTuple" for mark in marks
    )


def test_every_type_that_carries_data_shows_an_example() -> None:
    lacking = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if carries_data(node) and ">>> " not in (ast.get_docstring(node) or ""):  # type: ignore[arg-type]
                lacking.append(f"{path.relative_to(HOME)}: {node.name}")  # type: ignore[attr-defined]
    assert not lacking


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_in_docstrings_give_what_they_say(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert tried > 0
    assert failed == 0
