"""The README's commands parse, and its Python runs."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from alignkit.cli import main
from alignkit.cli.command import TOOLS, Parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every ``alignkit …`` line of a shell block, continued lines joined."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("alignkit ")]


def test_there_are_commands_of_every_kind() -> None:
    assert {c[0] for c in commands()} >= {"fit", *TOOLS}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if command[0] in TOOLS:
        module = importlib.import_module(TOOLS[command[0]][1])
        if hasattr(module, "parse"):
            assert module.parse(command[1:])
            return
        parser = Parser()
        module.add_arguments(parser)
        assert parser.parse_args(command[1:])
    else:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--print_config"])
        assert stop.value.code in (0, None)
        assert "class_path: alignkit." in capsys.readouterr().out


def test_python_runs(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The new objective is a loss, and scoring scores three responses."""
    _, objective, scoring = blocks("python")  # the first one trains: tests/test_site.py
    space: dict[str, object] = {}
    monkeypatch.setitem(
        sys.modules, "mine", ModuleType("mine")
    )  # where a dataclass looks itself up
    space["__name__"] = "mine"
    exec(objective, space)
    assert space["Simple"].__mro__[1].__name__ == "PreferenceLoss"  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    Path("pythia-160m").symlink_to(model_dir("gpt_neox"))
    exec(scoring, space)
    assert space["batch"].num_responses == 3  # type: ignore[attr-defined]
