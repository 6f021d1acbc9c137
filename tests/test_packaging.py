"""What a wheel holds, and what pyproject, constraints and the Makefile promise one another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
CONSTRAINTS = [
    Requirement(line.partition("#")[0].strip())
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.partition("#")[0].strip()
]


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in found if requirement.name != "alignkit"]


def test_every_dependency_is_constrained_within_its_range() -> None:
    exact = {c.name: str(c.specifier).removeprefix("==") for c in CONSTRAINTS}
    for requirement in requirements():
        assert requirement.name in exact
        assert requirement.specifier.contains(exact[requirement.name]), requirement


def test_the_pythons_promised_are_those_checked() -> None:
    """No pin is for some of them only; the tools check against the oldest."""
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    promised = [m[1] for c in PROJECT["classifiers"] if (m := re.fullmatch(pattern, c))]
    oldest = promised[0]
    assert PROJECT["requires-python"] == f">={oldest}"
    assert SETTINGS["tool"]["mypy"]["python_version"] == oldest
    assert SETTINGS["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert not [c for c in CONSTRAINTS if c.marker is not None and "python" in str(c.marker)]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_file_compiles_on_each_python_here(version: str, tmp_path: Path) -> None:
    """With warnings as errors, which is how a newer Python announces what it will refuse."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no python{version} on this machine")
    folders = [str(ROOT / name) for name in ("alignkit", "tests", "benchmarks", "notebooks")]
    done = subprocess.run(
        [python, "-W", "error", "-m", "compileall", "-q", "-f", *folders],
        env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_malicious_releases_of_lightning_are_out_of_reach() -> None:
    (lightning,) = (r for r in requirements() if r.name == "lightning")
    assert not any(lightning.specifier.contains(v) for v in ("2.6.2", "2.6.3"))
    assert lightning.specifier.contains("2.6.4")


def test_a_dry_run_of_each_make_target_installs_first() -> None:
    for target, runs in {"demo": "alignkit demo", "test": "pytest", "check": "pip-audit"}.items():
        made = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "VENV=/no/such/venv", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"-m venv /no/such/venv.*--constraint constraints.txt", made, re.DOTALL)
        assert runs in made.splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "alignkit = alignkit.__main__:main" in archive.read(entry_points).decode()
    assert {
        "alignkit/py.typed",
        "alignkit/tools/demo/knowledge.txt",
        "alignkit/configs/demo/dpo.yaml",
        "alignkit/models/load.py",
    } <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "runs")) for name in names)
