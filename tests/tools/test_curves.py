"""Curves: what TensorBoard wrote is what is read, and pictures that hold it."""

from __future__ import annotations

import os
from math import sin
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from alignkit.errors import AlignkitError
from alignkit.tools.curves import draw_curves, plot_curves, read_scalars, smooth
from alignkit.tools.plots import new_figure, save


def log(directory: Path, tag: str, points: list[tuple[int, float]]) -> None:
    with SummaryWriter(str(directory)) as writer:
        for step, value in points:
            writer.add_scalar(tag, value, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "dpo" / "version_0"
    steps = range(0, 400, 2)
    log(directory, "train/loss", [(i, 0.7 - i / 1000 + 0.05 * sin(i)) for i in steps])
    log(directory, "val/loss", [(i, 0.7 - i / 1200) for i in range(0, 401, 100)])
    log(directory, "val/rewards/accuracies", [(i, 0.5 + i / 2000) for i in range(0, 401, 100)])
    return tmp_path / "dpo"


def test_all_points_come_back_in_order(run: Path) -> None:
    """More than TensorBoard's default reservoir would keep is asked for: nothing is thinned."""
    log(run / "version_0", "train/lr", [(i, i / 2) for i in range(11_000)])
    scalars = read_scalars(run)
    assert [step for step, _ in scalars["train/lr"]] == list(range(11_000))
    assert scalars["train/lr"][7] == (7, 3.5)
    assert [value for _, value in scalars["val/rewards/accuracies"]] == pytest.approx(
        [0.5, 0.55, 0.6, 0.65, 0.7]
    )
    assert set(scalars) == {"train/loss", "train/lr", "val/loss", "val/rewards/accuracies"}


def test_a_resumed_run_counts_the_later_value(tmp_path: Path) -> None:
    log(tmp_path, "train/loss", [(0, 3.0), (1, 2.0), (2, 9.0)])
    log(tmp_path, "train/loss", [(2, 1.0), (3, 0.5)])
    assert read_scalars(tmp_path)["train/loss"] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]


def test_the_version_written_last_is_read(tmp_path: Path) -> None:
    for version, (value, written) in enumerate([(1.0, 200.0), (2.0, 100.0)]):
        directory = tmp_path / f"version_{version}"
        log(directory, "x", [(0, value)])
        for event in directory.iterdir():
            os.utime(event, (written, written))
    assert read_scalars(tmp_path)["x"] == [(0, 1.0)]


def test_a_picture_is_drawn(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "curves.png"
    tags = ["train/loss", "val/loss", "val/rewards/accuracies"]
    plot_curves({"dpo": run, "again": run}, tags, out)
    with Image.open(out) as picture:
        width, height = picture.size
        colors = {color for _, color in picture.convert("RGB").getcolors(width * height)}
    assert width > 2 * height, "two panels side by side"
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors, "a colour a run"


def test_an_unknown_tag_is_answered_with_those_there_are(run: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="no run has 'train/los'; there are train/loss, val"):
        plot_curves({"dpo": run}, ["train/los"], tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a$b", "$x^{", "水 🦙", "_hidden"])
def test_any_name_is_in_the_legend(run: Path, tmp_path: Path, name: str) -> None:
    """No name is mathematics, a warning about a glyph, or left out."""
    scalars = {name: read_scalars(run), "dpo": read_scalars(run)}
    figure = draw_curves(scalars, ["val/loss"])
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.strip().replace("\\", "") for text in shown] == [f"{name} val", "dpo val"]
    save(figure, tmp_path / "curves.png")


def test_moving_average() -> None:
    """Weight ½ on 4, 1: 2/½ = 4, then (½·2 + ½·1)/(1 − ¼) = 2; a constant stays one."""
    assert smooth([4.0, 1.0], weight=0.5) == pytest.approx([4.0, 2.0])
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)


def test_no_events(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="no TensorBoard event files"):
        read_scalars(tmp_path)
    with pytest.raises(AlignkitError, match="no TensorBoard event files"):
        plot_curves({"a": tmp_path / "none"}, ["train/loss"], tmp_path / "x.png")


def test_a_picture_takes_the_format_of_its_name_and_none_is_left_half_drawn(tmp_path: Path) -> None:
    figure, _ = new_figure(1)
    save(figure, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="xyz"):
        save(figure, tmp_path / "a.xyz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]


def test_a_short_run_has_whole_steps() -> None:
    figure = draw_curves({"dpo": {"val/loss": [(3, 0.4), (7, 0.2)]}}, ["val/loss"])
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
