"""``alignkit report``: a picture and a page of what runs have logged."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from alignkit.errors import AlignkitError
from alignkit.tools.curves import _draw
from alignkit.tools.plots import COLORS, new_figure
from alignkit.tools.report import report


def log(directory: Path, losses: dict[str, list[float]]) -> None:
    with SummaryWriter(str(directory)) as writer:
        for tag, values in losses.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    log(tmp_path / "sft" / "version_0", {"train/loss": [3.0, 2.0], "val/loss": [2.5]})
    log(tmp_path / "sft" / "version_1", {"train/loss": [3.0, 1.0]})
    log(tmp_path / "dpo" / "version_0", {"train/loss": [0.69], "val/rewards/accuracies": [0.625]})
    return [str(tmp_path / "sft"), f"mine={tmp_path / 'dpo'}"]


def test_every_version_is_drawn_and_summed_up(runs: list[str], tmp_path: Path) -> None:
    folder = report(runs, str(tmp_path / "out"))
    text = (folder / "index.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert rows[1:] == [
        ["sft/version_0", "1", "2", "2.5", "–"],
        ["sft/version_1", "1", "1", "–", "–"],
        ["mine", "0", "0.69", "–", "0.625"],
    ]
    (data,) = re.findall(r'src="data:image/png;base64,(.*?)"', text)
    assert base64.b64decode(data) == (folder / "losses.png").read_bytes()
    assert 'src="http' not in text


def test_a_single_point_is_seen() -> None:
    """A line of one point would leave nothing in the panel."""
    _, (axis,) = new_figure(1)
    _draw(axis, [(0, 0.69)], "train/loss", "", COLORS[0])
    _draw(axis, [(0, 0.69), (1, 0.6)], "train/loss", "", COLORS[0])
    assert [line.get_marker() for line in axis.lines] == ["o", "None"]


def test_mistakes(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(AlignkitError, match="no TensorBoard event files"):
        report([str(tmp_path / "none")])
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignkitError, match=r"output .*file"):
        report(runs, str(tmp_path / "file"))


def test_other_folders_beside_versions_are_left_alone(runs: list[str], tmp_path: Path) -> None:
    log(tmp_path / "sft" / "version_old", {"train/loss": [9.0]})
    text = (report(runs[:1], str(tmp_path / "out")) / "index.html").read_text(encoding="utf-8")
    assert "version_old" not in text
    assert "sft/version_1" in text


def test_it_names_runs_and_places_as_given(
    runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / ("long [v2] " * 9)))
    folder = report(runs, "~/out")
    assert (folder / "losses.png").is_file()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"wrote {folder / 'losses.png'} and {folder / 'index.html'}"
    with pytest.raises(AlignkitError, match=r"^runs: .* are both called"):
        report([runs[0], runs[0]])
