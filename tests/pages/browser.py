"""A headless browser in a process of its own: what a page shows, and what goes wrong in it.

``python browser.py URL WIDTH SCREENSHOT [PATTERN…]`` prints one line of JSON, once the patterns
match what can be read. Requests that leave this machine are blocked and told.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SETTLES_MS = 700
_GIVES_UP_MS = 120_000
_HEIGHT = 900
_TEXT = r"""(function read(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.nodeValue.replace(/\s+/g, " ");
  if (["STYLE", "SCRIPT", "NOSCRIPT", "TEMPLATE"].includes(node.nodeName)) return "";
  const style = node.nodeType === Node.ELEMENT_NODE ? getComputedStyle(node) : {};
  if (style.display === "none" || style.visibility === "hidden") return "";
  const inner = [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
  const text = inner.map(read).join("");
  return ["inline", "contents"].includes(style.display) ? text : `\n${text}\n`;
})(document.body).replace(/\s*\n\s*/g, "\n")"""
"""What can be read from top to bottom, also inside web components, which innerText leaves out."""
_LOOK = f"""JSON.stringify({{
  title: document.title,
  text: {_TEXT},
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  broken: [...document.images].filter(each => !each.naturalWidth).map(each => each.outerHTML),
}})"""


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


def look(url: str, screenshot: Path, width: int = 1280, awaited: Sequence[str] = ()) -> Seen:
    """Open a page, wait until the awaited patterns match its text, and return what is seen."""
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu",
    }
    command = [sys.executable, __file__, url, str(width), str(screenshot), *awaited]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def _main(url: str, width: int, screenshot: str, awaited: Sequence[str]) -> int:
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
        missing = [each for each in awaited if not re.search(each, str(found["text"]))]
        if missing:
            found["missing"] = missing
            QTimer.singleShot(_SETTLES_MS, read)
            return
        found.pop("missing", None)
        QTimer.singleShot(_SETTLES_MS, photograph)

    def photograph() -> None:
        picture = view.grab()
        picture.save(screenshot)
        image = picture.toImage()
        across, down = range(0, image.width(), 4), range(0, image.height(), 4)
        found["colors"] = len({image.pixel(x, y) for x in across for y in down})
        print(json.dumps(found))
        application.quit()

    def read() -> None:
        page.runJavaScript(_LOOK, keep)

    def loaded(well: bool) -> None:
        if not well:
            print(f"{url}: did not load", file=sys.stderr)
            application.exit(1)
        QTimer.singleShot(_SETTLES_MS, read)

    def give_up() -> None:
        view.grab().save(screenshot)
        print(f"{url}: waited too long; {found}", file=sys.stderr)
        application.exit(2)

    view.loadFinished.connect(loaded)
    QTimer.singleShot(_GIVES_UP_MS, give_up)
    view.load(QUrl(url))
    status: int = application.exec()
    return status


if __name__ == "__main__":
    status = _main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
