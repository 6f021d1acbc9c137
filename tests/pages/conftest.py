"""A browser for every test of this folder, and a place for what it saw."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _browser() -> None:
    pytest.importorskip(
        "PyQt6.QtWebEngineCore", reason="the extra browser is not installed", exc_type=ImportError
    )


@pytest.fixture
def screenshot(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """``screenshot(name)``: a file, in ``ALIGNKIT_SCREENSHOTS`` if that names a folder."""
    folder = Path(os.environ.get("ALIGNKIT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    width = getattr(getattr(request.node, "callspec", None), "params", {}).get("width", "")
    return lambda name: folder / f"{name}{f'_{width}' if width else ''}.png"
