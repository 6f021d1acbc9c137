"""Draw the curves of runs from their TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignkit.errors import AlignkitError
from alignkit.tools.plots import COLORS, new_figure, save
from alignkit.utils.atomic import check_output

_SMOOTH_FROM = 30  # fewer points are drawn as they are

Scalars = dict[str, list[tuple[int, float]]]


def read_scalars(run_dir: str | Path) -> Scalars:
    """Return every scalar of a run.

    Args:
        run_dir: A directory with event files, or one above it: of several versions below, the
            one written to last is read.

    Returns:
        From a tag to its (step, value) pairs in order of steps. If a resumed run logged a step
        again, the later value counts.

    Raises:
        AlignkitError: There are no event files.
    """
    # Imported here because it takes a second, which drawing other things does not need.
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = sorted(Path(run_dir).rglob("events.out.tfevents.*"))
    if not events:
        raise AlignkitError(f"run '{run_dir}': no TensorBoard event files; pass a run's directory")
    here = [event for event in events if event.parent == Path(run_dir)]
    newest = max(here or events, key=lambda event: event.stat().st_mtime)
    accumulator = EventAccumulator(str(newest.parent), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: sorted(
            {
                point.step: float(point.value)
                for point in sorted(accumulator.Scalars(tag), key=lambda p: p.wall_time)
            }.items()
        )
        for tag in accumulator.Tags()["scalars"]
    }


def plot_curves(runs: Mapping[str, str | Path], tags: Sequence[str], out: str | Path) -> None:
    """Draw tags of runs as a picture, with a panel for each quantity.

    ``train/loss`` and ``val/loss`` share the panel *loss*. Training is a thin line under its moving
    average; validation is dashed, with a marker at every point.

    Args:
        runs: From a name in the legend to a run's directory.
        tags: Tags such as ``train/loss``; a run without one of them is left out of that panel.
        out: The picture's path.

    Raises:
        AlignkitError: A run has no event files, no run has one of the tags (those there are get
            listed), or the picture cannot be written.
    """
    target = check_output(str(out), "out")
    figure = draw_curves({name: read_scalars(place) for name, place in runs.items()}, tags)
    if target is not None:
        save(figure, target)


def draw_curves(scalars: Mapping[str, Scalars], tags: Sequence[str]) -> Figure:
    """Return the picture of `plot_curves`.

    Args:
        scalars: From a name in the legend to a run's scalars.
        tags: As there.

    Raises:
        AlignkitError: No run has one of the tags.
    """
    for tag in tags:
        if not any(tag in found for found in scalars.values()):
            known = ", ".join(sorted({tag for found in scalars.values() for tag in found}))
            raise AlignkitError(f"tags: no run has '{tag}'; there are {known or 'none'}")
    panels: dict[str, list[str]] = {}
    for tag in tags:
        panels.setdefault(tag.partition("/")[2] or tag, []).append(tag)
    figure, axes = new_figure(len(panels))
    for axis, (quantity, group) in zip(axes, panels.items(), strict=True):
        for color, (name, found) in zip(COLORS * len(scalars), scalars.items(), strict=False):
            for tag in group:
                if tag in found:
                    _draw(axis, found[tag], tag, name if len(scalars) > 1 else "", color)
        axis.set(title=quantity, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 3.5
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    return figure


def _draw(axis: Axes, points: list[tuple[int, float]], tag: str, run: str, color: str) -> None:
    steps, values = zip(*points, strict=True)
    # matplotlib reads `$` as mathematics, and leaves names with `_` in front out of a legend.
    label = " ".join(filter(None, [run.replace("$", r"\$"), tag.partition("/")[0]]))
    label = f" {label}" if label.startswith("_") else label
    if not tag.startswith("train/"):
        axis.plot(steps, values, "--o", color=color, markersize=4, label=label)
    elif len(values) < _SMOOTH_FROM:
        marker = "o" if len(values) == 1 else None  # a line of one point would not be seen
        axis.plot(steps, values, color=color, marker=marker, label=label)
    else:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth(values), color=color, label=label)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, without the bias towards zero of its start.

    The correction is Adam's (Kingma and Ba 2014, arXiv:1412.6980, section 3).

    Args:
        values: The values in order.
        weight: The weight of the past, in [0, 1).

    Example:
        >>> [round(value, 3) for value in smooth([4.0, 1.0], weight=0.5)]
        [4.0, 2.0]
    """
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
