"""docs/watching.md: its configurations parse, and the names it explains are logged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignkit.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "watching.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_parses(
    config: str, model_dir: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "Trackio" in config:
        pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.chdir(tmp_path)
    Path("watch.yaml").write_text(config)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "watch.yaml", "--model", "DPOModule", "--model.base",
              str(model_dir("gpt2")), "--data", "PreferenceDataModule", "--data.path",
              "pairs.jsonl", "--print_config"])  # fmt: skip
    assert not stop.value.code
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    part = yaml.safe_load(config)["trainer"].popitem()
    given, found = part[1], trainer[part[0]]
    for one, other in zip(*([each] if isinstance(each, dict) else each for each in (given, found)),
                          strict=False):  # fmt: skip
        assert other["class_path"].endswith(one["class_path"].rpartition(".")[2])
        assert one["init_args"].items() <= other["init_args"].items()


def test_there_are_five() -> None:
    assert len(CONFIGS) == 5
