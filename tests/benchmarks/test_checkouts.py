"""Two checkouts are compared by the losses, time and memory of equal steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = [sys.executable, str(ROOT / "benchmarks" / "checkouts.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_checkout_beside_itself_trains_alike(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    few = ("--rounds", 1, "--steps", 1, "--pairs", 2)
    done = run("--before", ROOT, "--shapes", "llama", *few, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert [row["stage"] for row in found] == ["SFTModule", "DPOModule"]
    assert all(row["loss_difference"] == 0 and row["time"] > 0 for row in found)


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = run("--before", tmp_path)
    assert done.returncode == 2
    assert "holds no alignkit package" in done.stderr
