"""A headless browser in a process of its own: what a page shows, and what goes wrong in it.

``python browser.py URL WIDTH SCREENSHOT`` prints one line of JSON. Requests that leave this
machine are blocked and told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_SETTLES_MS = 700
_GIVES_UP_MS = 60_000
_HEIGHT = 900
_LOOK = """JSON.stringify({
  title: document.title,
  text: document.body.innerText,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  broken: [...document.images].filter(each => !each.naturalWidth).map(each => each.outerHTML),
})"""


@dataclass(frozen=True)
class Seen:
    """What a browser found.

    Attributes:
        title: The page's.
        text: What can be read on it.
        overflow: Pixels by which it is wider than the window.
        broken: Images that show nothing.
        errors: Lines that its scripts wrote as errors.
        asked: Addresses beyond this machine that it wanted.
        colors: How many colours the screenshot has; a blank page has one.
    """

    title: str
    text: str
    overflow: int
    broken: list[str]
    errors: list[str]
    asked: list[str]
    colors: int


def look(url: str, screenshot: Path, width: int = 1280) -> Seen:
    """Open a page and return what is seen."""
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu",
    }
    command = [sys.executable, __file__, url, str(width), str(screenshot)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def _main(url: str, width: int, screenshot: str) -> int:
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineUrlRequestInterceptor,
    )
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    found: dict[str, object] = {"errors": [], "asked": []}

    class Page(QWebEnginePage):  # type: ignore[misc]
        def javaScriptConsoleMessage(self, level, message, line, source):  # type: ignore[no-untyped-def]
            if level == QWebEnginePage.JavaScriptConsoleMessageLevel.ErrorMessageLevel:
                found["errors"].append(f"{source}:{line}: {message}")  # type: ignore[attr-defined]

    class Blocker(QWebEngineUrlRequestInterceptor):  # type: ignore[misc]
        def interceptRequest(self, info):  # type: ignore[no-untyped-def]
            address = info.requestUrl()
            if address.scheme() in ("http", "https", "ws") and address.host() != "127.0.0.1":
                found["asked"].append(address.toString())  # type: ignore[attr-defined]
                info.block(True)

    profile, blocker = QWebEngineProfile(), Blocker()
    profile.setUrlRequestInterceptor(blocker)
    view = QWebEngineView()
    page = Page(profile, view)
    view.setPage(page)
    view.resize(width, _HEIGHT)
    view.show()

    def keep(text: str) -> None:
        found.update(json.loads(text))
        picture = view.grab()
        picture.save(screenshot)
        image = picture.toImage()
        across, down = range(0, image.width(), 4), range(0, image.height(), 4)
        found["colors"] = len({image.pixel(x, y) for x in across for y in down})
        print(json.dumps(found))
        application.quit()

    def loaded(well: bool) -> None:
        if not well:
            print(f"{url}: did not load", file=sys.stderr)
            application.exit(1)
        QTimer.singleShot(_SETTLES_MS, lambda: page.runJavaScript(_LOOK, keep))

    view.loadFinished.connect(loaded)
    QTimer.singleShot(_GIVES_UP_MS, lambda: application.exit(2))
    view.load(QUrl(url))
    status: int = application.exec()
    return status


if __name__ == "__main__":
    os._exit(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3]) or sys.stdout.flush() or 0)
