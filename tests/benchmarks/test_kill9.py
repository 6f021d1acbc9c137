"""A few of the kills that the documentation counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.mark.slow
def test_no_checkpoint_is_lost_to_a_kill(tmp_path: Path) -> None:
    """Four runs that save all the time, two with the temporary folder elsewhere."""
    results = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / "kill9.py", "--kills", "4", "--width", "256"]
    run = subprocess.run([*command, "--json", results], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(results.read_text())
    assert found["count"] == 4 and found["elsewhere"] == 2
    assert found["files_checked"] >= 4
    assert found["files_lost"] == 0
