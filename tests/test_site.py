"""The documentation: it builds without a warning, its code runs or parses, its names exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

import alignkit
from alignkit.cli import main
from alignkit.cli.command import TOOLS, Parser
from alignkit.cli.stages import STAGES
from alignkit.lora import LoRAConfig
from alignkit.objectives import preference
from alignkit.objectives.reward import BradleyTerry
from alignkit.objectives.unpaired import KTO

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def table(page: Path, heading: str = "") -> list[tuple[str, str]]:
    """Return the rows of the tables of two columns below a heading."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = text.partition(heading)[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return [(left.strip(), right.strip()) for left, right in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_the_first_python_trains(
    page: Path, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten lines train DPO and save a checkpoint; only the model and the steps are others here."""
    code = blocks(page, "python")[0]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    code, found = re.subn(r'base = "[^"]+"', f"base = {str(model_dir('llama'))!r}", code)
    assert found == 1
    options = "max_steps=2, accelerator='cpu', logger=False, enable_progress_bar=False"
    code, found = re.subn(r"max_steps=\d+", options, code)
    assert found == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"Why {n}?", "chosen": f"Because of {n}.", "rejected": "No."} for n in range(40)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(code, str(page), "exec"), {})
    assert Path("dpo.ckpt").is_file()


def tool_commands() -> list[Any]:
    """Every ``alignkit TOOL …`` line of the pages' shell blocks."""
    found = []
    for page in PAGES[1:]:
        lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
        for line in lines:
            # a command of several lines is no alignkit command
            words = shlex.split(line, comments=True) if line.startswith("alignkit ") else []
            # `plan` takes the options of `fit`; tests/test_readme.py tries it.
            if words and words[1] in {*TOOLS} - {"plan"}:
                found.append(pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:])}"))
    return found


@pytest.mark.parametrize("command", tool_commands())
def test_commands_parse(command: list[str]) -> None:
    parser = Parser()
    importlib.import_module(TOOLS[command[0]][1]).add_arguments(parser)
    assert parser.parse_args(command[1:])


def training_commands(page: Path) -> list[list[str]]:
    """Return a page's lines that train or copy a configuration, in their order."""
    lines = "\n".join(blocks(page, "(?:sh)?")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("alignkit ")]
    return [each for each in words if each[0] in {*STAGES, "fit", "validate", "test", "configs"}]


@pytest.mark.parametrize(
    "page",
    # Those of objectives.md and extend.md have tests of their own.
    [p for p in PAGES[1:] if p.stem not in ("objectives", "extend") and training_commands(p)],
    ids=lambda page: page.stem,
)
def test_what_a_page_trains_by_works_as_it_is_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line, from a clone's folder: a configuration that no line copies is none."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(
        r"saved as `([\w.]+)`:\n\n```yaml\n(.*?)^```", text, re.M | re.S
    ):
        Path(name).write_text(content)
    for command in training_commands(page):
        if command[0] == "configs":
            assert main(command) == 0
        elif "--help" not in command and "DIR" not in command:  # what the reader has to fill in
            with pytest.raises(SystemExit) as ended:
                main([*command, "--print_config"])
            told = capsys.readouterr()
            assert ended.value.code in (0, None), (command, told.err)


@pytest.mark.parametrize("page", ["from_trl", "from_llama_factory"])
def test_the_configuration_side_by_side_is_one(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = blocks(DOCS / f"{page}.md", "yaml")[-1]
    Path("dpo.yaml").write_text(config)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "dpo.yaml", "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config)
    assert printed["model"]["init_args"]["lora"]["r"] == given["model"]["init_args"]["lora"]["r"]


def options() -> set[str]:
    """Return every dotted option that a page may name."""
    found = {"ckpt_path", "seed_everything", "trainer.logger.save_dir"}
    found |= {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    found |= {f"model.lora.{field.name}" for field in dataclasses.fields(LoRAConfig)}
    for kind in (alignkit.DPOModule, alignkit.AlignmentModule):
        found |= {f"model.{name}" for name in inspect.signature(kind).parameters}
    for name in alignkit.__all__:
        kind = getattr(alignkit, name)
        for parent in kind.__mro__ if name.endswith("DataModule") else ():
            found |= {f"data.{name}" for name in inspect.signature(parent).parameters}
    for loss in (preference.DPO, KTO, BradleyTerry):
        found |= {f"model.loss.{field.name}" for field in dataclasses.fields(loss)}
    return found | {"model.optimizer.lr", "model.optimizer.weight_decay"}


@pytest.mark.parametrize("page", ["from_trl", "from_llama_factory"])
def test_every_option_that_a_table_names_exists(page: str) -> None:
    known = options()
    for _, ours in table(DOCS / f"{page}.md"):
        for name in re.findall(
            r"`((?:model|data|trainer)\.[\w.]+|ckpt_path|seed_everything)`", ours
        ):
            assert name in known, name
        for name in re.findall(r"`model\.loss` (\w+)", ours):
            assert hasattr(preference, name), name


def test_every_argument_of_trl_is_named_and_no_other() -> None:
    """Of what TRL adds to the Trainer's arguments none is left out."""
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments

    page = DOCS / "from_trl.md"
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    told = {
        heading: {name for left, _ in table(page, heading) for name in re.findall(r"`(\w+)`", left)}
        for heading in (
            *(f"## Arguments of {kind}Config" for kind in ("DPO", "SFT", "KTO", "Reward")),
            "## Arguments that",
        )
    }
    for kind in ("DPO", "SFT", "KTO", "Reward"):
        fields = {field.name for field in dataclasses.fields(getattr(trl, f"{kind}Config"))}
        own = told[f"## Arguments of {kind}Config"]
        assert kind == "DPO" or own <= fields  # DPO's losses are listed there too
        assert fields - shared <= own | told["## Arguments of DPOConfig"]
    losses = re.findall(
        r"'(\w+)'", trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    )
    named = {left.strip("`"): right.strip("`") for left, right in table(page)}
    for name in losses:
        assert hasattr(preference, named[name]), name
    assert told["## Arguments that"] <= shared


def test_every_argument_of_peft_is_named_and_no_other() -> None:
    peft = pytest.importorskip("peft")
    rows = table(DOCS / "from_trl.md", "## PEFT's LoraConfig")
    told = {name for left, _ in rows for name in re.findall(r"`(\w+)`", left)}
    assert told == {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None
    or importlib.util.find_spec("material") is None
    or importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="the extra docs is not installed",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "from_trl" / "index.html").is_file()
    assert "score_with_stats" in (tmp_path / "reference" / "index.html").read_text()
    for built_page in tmp_path.rglob("*.html"):
        assert "```" not in built_page.read_text(encoding="utf-8"), f"{built_page}: an unread fence"
