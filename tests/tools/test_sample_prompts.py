"""What `sample`, `generate` and `compare` refuse of their prompts, and where they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.tools.compare import compare
from alignkit.tools.generate.command import generate
from alignkit.tools.sample import sample

SHORT = {"max_new_tokens": 4, "temperature": 1.0, "device": "cpu"}


@pytest.fixture
def base(model_dir: Callable[[str], Path]) -> str:
    return str(model_dir("gpt2"))


def written(path: Path, *prompts: Any) -> str:
    path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    return str(path)


@pytest.mark.parametrize("option", ["prompts_file", "data"])
def test_no_command_writes_the_file_that_it_reads(base: str, tmp_path: Path, option: str) -> None:
    """Nor through a link to it, nor a data set's part."""
    path = written(tmp_path / "prompts.jsonl", "Why?")
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    before = Path(path).read_text()
    given = {**SHORT, option: f"{path}#train[:1]" if option == "data" else path}
    refused = pytest.raises(AlignkitError, match="is a file that is read; name another")
    for output in (path, str(link)):
        with refused:
            sample(base, output=output, **given)
        for flag in ("json", "jsonl"):
            with refused:
                generate(base, **{flag: output}, **given)
        for flag in ("json", "markdown", "html"):
            with refused:
                compare([base], **{flag: output}, **given)
    assert Path(path).read_text() == before
    assert not link.with_name(f".{link.name}.lock").exists()
    (tmp_path / "old.jsonl").write_text("")
    sample(base, output=str(tmp_path / "old.jsonl"), answers=2, **given)
