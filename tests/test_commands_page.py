"""docs/commands.md names every command, with an example and options that exist."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

from alignkit.cli import main
from alignkit.cli.commands import COMMANDS

PAGE = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))


def test_every_command_has_a_section_with_an_example() -> None:
    """In the order of `alignkit --help`, and no other."""
    assert list(SECTIONS) == list(COMMANDS)
    for name, body in SECTIONS.items():
        assert re.search(rf"^(source <\()?alignkit {name}\b", body, re.M), name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "completion"])
def test_the_options_of_a_section_are_the_commands(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = re.findall(r"`(--[\w-]+)`", "".join(re.findall(r"^\| `.*? \|", SECTIONS[name], re.M)))
    with suppress(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    missing = [option for option in named if not re.search(rf"{option}\b", told)]
    assert not missing
