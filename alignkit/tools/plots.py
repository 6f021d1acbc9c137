"""Make figures of one style, without changing matplotlib's global state."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignkit.utils.atomic import write_atomically

# The palette of Okabe and Ito, whose colours are distinct with any colour vision.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_PANEL_INCHES = (4.8, 3.4)


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, at most three in a row and the rows evenly filled."""
    rows = -(-panels // 3)
    columns = -(-panels // rows)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, in the format of its suffix or else as PNG."""
    kind = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: _draw(figure, file, kind))


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG picture."""
    image = io.BytesIO()
    _draw(figure, image, "png")
    return image.getvalue()


def _draw(figure: Figure, file: BinaryIO, kind: str) -> None:
    with warnings.catch_warnings():  # names may be in any script
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format=kind, dpi=150)
