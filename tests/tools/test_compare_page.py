"""``compare --html``: one file, the answers as they are, and where adapters moved their base."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from alignkit.models import load_model, load_tokenizer
from alignkit.tools.compare import compare
from alignkit.tools.compare_page import comparison_page
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.asking import DEFAULT_FORMAT
from alignkit.tools.moved import moved_tokens

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Refuse tags that do not close one another, and gather classes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.answers: list[tuple[str, str]] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [str(given[name]) for name in ("src", "href") if name in given]
        if tag not in VOID:
            self.open.append(tag)
        if (given.get("class") or "").startswith("answer"):
            self.answers.append((str(given["class"]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "section" in self.open and "div" in self.open[self.open.index("section") :]:
            kind, text = self.answers[-1]
            self.answers[-1] = (kind, text + data)


def test_the_page_holds_the_answers(moved_models: dict[str, str], tmp_path: Path) -> None:
    options = {"max_new_tokens": 6, "temperature": 0.9, "device": "cpu", "seed": 2}
    place = tmp_path / "page.html"
    prompts = ["Who <b>?", "Why & when?"]
    found = compare(moved_models, prompts=prompts, html=str(place), **options)
    text = place.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.sources  # one file that needs no other
    assert "Who &lt;b&gt;?" in text
    shown = [words.strip() for _, words in page.answers]
    wanted = [found.answers[name][i] for i in range(2) for name in moved_models]
    assert shown == wanted
    assert all(kind == "answer cut" for kind, _ in page.answers)
    ratios = [float(r) for r in re.findall(r'title="([+-]\d+\.\d\d)"', text)]
    assert any(ratio > 0 for ratio in ratios)
    assert len(ratios) <= 12  # of the adapter's two answers alone


def test_gauges_cuts_and_failures() -> None:
    answers = {
        "a": [Answer("x x x x\n\nHuman: y", (1, 1, 1, 1, 2, 3), ended=False)],
        "b": [Answer("good", (5, 6), ended=True, end=(0,))],
    }
    moved = {"a": [[("x", 1.0), ("y", -9.0)]], "b": [[("good", None)]]}
    text = comparison_page(["Q"], answers, moved, {"c": "no such <file>"})
    page = Page(text)
    assert [kind for kind, _ in page.answers] == ["answer cut", "answer"]
    cells = re.findall(r"<td class=n>(.*?)</td>", text)
    assert cells == ["6.0", "0%", "0%", "25.0%", "100%", "2.0", "100%", "0%", "0.0%", "0%"]
    assert "no such &lt;file&gt;" in text
    assert 'title="-9.00"' in text


def test_a_character_of_several_tokens_stays_whole(
    model_dir: Callable[[str], Path], tokenizer_dir: Path
) -> None:
    base = str(model_dir("llama"))
    tokenizer = load_tokenizer(str(tokenizer_dir))
    ids = tokenizer("é, 水!").input_ids
    assert len(ids) > 6
    pieces = moved_tokens(load_model(base), tokenizer, DEFAULT_FORMAT, "Who?", ids)
    assert len(pieces) == len(ids)
    assert [text for text, _ in pieces if text] == ["é", ",", " ", "水", "!"]
