"""The command line and its user's files, as in the tests of the command; a run to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import alignkit, hh, workplace
from tests.lightning.helpers import Run

__all__ = ["alignkit", "hh", "workplace"]


@pytest.fixture
def run(model_dir: Callable[[str], Path], hh: Path, workplace: Path) -> Callable[..., Run]:
    """``run(**options)``: a short DPO run of the trainer's options, not yet begun."""

    def make(**options: Any) -> Run:
        return Run(model_dir("llama"), hh, workplace, **options)

    return make


@pytest.fixture(scope="session")
def _plain() -> dict[str, Run]:
    return {}


@pytest.fixture
def plain(run: Callable[..., Run], _plain: dict[str, Run]) -> Run:
    """The run without anything beside it."""
    if not _plain:
        _plain["run"] = run().fit()
    return _plain["run"]
