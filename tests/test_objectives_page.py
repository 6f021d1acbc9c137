"""The page of objectives names every loss, and its command lines and its picture are true."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from alignkit.cli import main
from alignkit.objectives.preference import DPO, known_losses
from alignkit.objectives.reward import BradleyTerry
from alignkit.objectives.unpaired import KTO

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^alignkit (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("objectives_page", DOCS / "objectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_loss_has_its_section(script: ModuleType) -> None:
    ship = {kind for kind in known_losses() if kind.__module__.startswith("alignkit.")}
    assert set(script.shipped()) == {*ship, KTO, BradleyTerry}
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == [k.__name__ for k in script.shipped()]
    assert len(COMMANDS) == len(script.shipped())


def test_the_page_is_what_its_script_writes(script: ModuleType) -> None:
    assert script.page() == PAGE
    for kind in script.shipped():
        assert re.search(r"\d{4}\.\d{5}", PAGE.partition(f"### {kind.__name__}\n")[2])


def test_the_picture_is_what_its_script_draws(script: ModuleType) -> None:
    """Equal words, and curves equal to a tenth of a point or two, whatever rounds them."""
    drawn, kept = script.picture(), (DOCS / "objectives.svg").read_text(encoding="utf-8")
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", drawn) == number.sub("#", kept)
    pairs = zip(number.findall(drawn), number.findall(kept), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=0.02, abs=0.25) for a, b in pairs)


def test_the_curves_of_dpo_are_its_gradient(script: ModuleType) -> None:
    """β σ(−βΔ): half of β at Δ = 0, both answers alike."""
    margins, up, down = script.pulls(DPO)
    at = margins.index(0.0)
    assert up[at] == pytest.approx(0.05)
    assert up == pytest.approx(down)


def test_every_command_line_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it is printed, with nothing prepared before it."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command), "--print_config"])
        assert ended.value.code in (0, None), command
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        if given := re.findall(r"--model (\w+)", command):
            assert model["class_path"].endswith(given[0])
        else:
            (name,) = re.findall(r"--model\.loss (\w+)", command)
            assert model["init_args"]["loss"]["class_path"].endswith(f".{name}"), command
