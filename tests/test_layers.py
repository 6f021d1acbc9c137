"""The package's floors and its size: imports run downward, files stay short, the core readable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import alignkit

HOME = Path(alignkit.__file__).parent
FLOORS = (
    "errors",
    "utils",
    "batch",
    "objectives",
    "lora",
    "engine",
    "models",
    "data",
    "modules",
    "callbacks",
    "cli",
    "tools",  # the command knows them by name alone
)
DATA = ("read", "text", "encode", "keep", "deal")
# Imports inside functions, each for the time or the package that it saves.
LATE: set[tuple[str, str]] = {
    ("__main__", "cli"),  # answers signals while torch is being imported
    ("cli.front", "cli.command"),  # answers --help and mistaken commands before it is
}
LONG: dict[str, str] = {
    "engine/tiles.py": "one kernel and its backward pass, which are read side by side",
}
DESIGN = HOME.parent / "docs" / "design.md"


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules of this package that a file imports, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignkit."):
            yield str(node.module).removeprefix("alignkit."), id(node) in top
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("alignkit."):
                    yield name.name.removeprefix("alignkit."), id(node) in top


def modules() -> Iterator[tuple[str, Path]]:
    """Yield every module's name below the package, and its file."""
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def test_no_import_runs_upward() -> None:
    wrong = []
    for name, path in modules():
        floor, *rest = name.split(".")
        for imported, _ in imports(path) if floor in FLOORS else ():
            below, *part = imported.split(".")
            if FLOORS.index(below) > FLOORS.index(floor):
                wrong.append(f"{name} imports {imported}")
            inside = floor == below == "data" and rest[:1] and rest[0] in DATA
            if inside and part[0] not in DATA[: DATA.index(rest[0]) + 1]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_import_is_late_without_a_reason() -> None:
    late = {
        (name, imported)
        for name, path in modules()
        for imported, at_top in imports(path)
        if name and not at_top
    }
    assert late <= LATE


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long_without_a_reason() -> None:
    long = {str(path.relative_to(HOME)) for path in HOME.rglob("*.py") if lines(path) > 300}
    assert long <= LONG.keys()


def test_the_core_is_read_in_an_afternoon() -> None:
    """The files of the design's reading order, all of them there, are short together."""
    section = DESIGN.read_text(encoding="utf-8").partition("## Reading order")[2]
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", "".join(re.findall(r"^\d+\. .*", section, re.M)))
    core = {HOME / name for name in named if name.endswith(".py")}
    core |= {path for name in named if name.endswith("/") for path in (HOME / name).glob("*.py")}
    assert len(core) > 20
    assert sum(map(lines, core)) < 3000
