"""Every page that a command or the site's build writes, opened in a headless browser."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from alignkit.tools.audit.command import audit
from alignkit.tools.compare import compare
from alignkit.tools.report import report
from tests.pages.browser import Seen, look

ROOT = Path(__file__).parents[2]
WIDTHS = (1280, 390)
"""A laptop's window and a phone's."""


def check(seen: Seen) -> None:
    """Nothing is broken, missing, wider than the window or fetched from elsewhere."""
    assert not seen.errors and not seen.broken and not seen.asked
    assert seen.overflow <= 0
    assert seen.colors > 8


@pytest.fixture
def compared(moved_models: dict[str, str], tmp_path: Path) -> Path:
    place = tmp_path / "compare.html"
    compare(
        moved_models,
        prompts=["Who are <b>you</b>?", "Why " + "is it so " * 20 + "?", "x" * 150],
        html=str(place),
        max_new_tokens=24,
        judge=moved_models["dpo"],
        device="cpu",
    )
    return place


@pytest.mark.parametrize("width", WIDTHS)
def test_compare(compared: Path, screenshot: Callable[[str], Path], width: int) -> None:
    seen = look(compared.as_uri(), screenshot("compare"), width)
    check(seen)
    assert "Who are <b>you</b>?" in seen.text and "dpo" in seen.text
    assert "at equal length" in seen.text


@pytest.mark.parametrize("width", WIDTHS)
def test_report(tmp_path: Path, screenshot: Callable[[str], Path], width: int) -> None:
    for name, count in (("sft", 40), ("dpo", 1)):
        with SummaryWriter(str(tmp_path / name / "version_0")) as writer:
            for step in range(count):
                writer.add_scalar("train/loss", 3 / (step + 1), step)
    folder = report([str(tmp_path / "sft"), str(tmp_path / "dpo")], str(tmp_path / "out"))
    seen = look((folder / "index.html").as_uri(), screenshot("report"), width)
    check(seen)
    assert "sft" in seen.text and "dpo" in seen.text


@pytest.mark.parametrize("width", WIDTHS)
def test_audit(tmp_path: Path, screenshot: Callable[[str], Path], width: int) -> None:
    rows = [
        f'{{"prompt": "Question {n} <i>?", "chosen": "Yes {"because " * n}", "rejected": "No"}}'
        for n in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows, "{broken", '{"prompt": "' + "y" * 400]))
    page = tmp_path / "audit.html"
    audit(str(tmp_path / "pairs.jsonl"), html=str(page))
    seen = look(page.as_uri(), screenshot("audit"), width)
    check(seen)
    assert "pairs.jsonl" in seen.text and "bad" in seen.text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The documentation, built and served on this machine."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["", "quickstart/", "objectives/", "results/", "reference/"])
@pytest.mark.parametrize("width", WIDTHS)
def test_site(site: str, screenshot: Callable[[str], Path], page: str, width: int) -> None:
    seen = look(f"{site}/{page}", screenshot(f"site_{page.strip('/')}"), width)
    check(seen)
    assert "alignkit" in seen.text
