"""The repository's tests that need CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from gpuday.day import Day

ROOT = Path(__file__).parents[2]
# `name PASSED [ 3%]`, or with pytest-xdist `[gw0] [ 3%] PASSED name`.
_LINE = re.compile(
    r"^(?:\S+::.* |\[gw\d+\] \[ *\d+%\] )(PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE
)


def test_files() -> list[str]:
    """The files with a test that is marked ``gpu``; collecting the others needs more packages."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in found if "pytest.mark.gpu" in f.read_text()]


def measure(day: Day) -> None:
    """Note how many passed, and the names and last lines of those that failed."""
    files = test_files()[:1] if day.tiny else test_files()
    report, output = day.scratch / "cuda-tests.xml", day.scratch / "cuda-tests.log"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu and not slow",
        f"--junitxml={report}",
        *files,
    ]
    # What is at stake is the device: a package that this machine lacks may be named in the
    # project's list of warnings, and another version's advice is no failure.
    command += ["-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None and not day.tiny:
        command += ["-n", "5"]
    began = time.monotonic()
    with output.open("w") as log:
        try:
            status: int | None = subprocess.call(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": _path(), "HF_HUB_OFFLINE": "1"},
                timeout=max(day.deadline - began, 30.0),
            )
        except subprocess.TimeoutExpired:
            status = None
    counts = Counter(_LINE.findall(output.read_text()))
    for name in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        taken = time.monotonic() - began
        day.note(name.lower(), counts[name], "tests", files=files, seconds=round(taken, 1))
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        for problem in (child for child in case if child.tag in ("failure", "error")):
            name = f"failed: {case.get('classname')}::{case.get('name')}"
            message = (problem.get("message") or "")[:600]
            day.note(name, message, "", text=(problem.text or "")[-1500:])
    if status not in (0, 5):  # 5: every file was skipped as a whole
        last = [line for line in output.read_text().splitlines() if line.strip()][-1:]
        told = "was broken off" if status is None else f"ended with status {status}"
        raise RuntimeError(f"pytest {told}: {' '.join(last)}")


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
