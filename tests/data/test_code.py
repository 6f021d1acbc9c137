"""Encoded sets are found again by the code that made them, not by its name."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import alignkit
from alignkit.data import HHPreferenceDataModule, HHSFTDataModule
from alignkit.data.encode import code
from alignkit.data.encode.code import UnknownContentError, code_identity
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.shapes import Side, sft_sides
from tests.data.conftest import write_jsonl

Q = "\n\nHuman: q\n\nAssistant:"
LIMIT = 1


def reader(answer: str) -> Callable[..., list[Side]]:
    def sides(row: Mapping[str, Any]) -> list[Side]:
        return [Side(Q, answer)]

    return sides


def tail_of(row: Mapping[str, Any], size: int) -> list[Side]:
    return [Side(Q, " " + row["chosen"][-size:])]


def limited(row: Mapping[str, Any]) -> list[Side]:
    return [Side(Q, " yes" * LIMIT)]


class Reader:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def __call__(self, row: Mapping[str, Any]) -> list[Side]:
        return [Side(Q, self.answer)]

    def read(self, row: Mapping[str, Any]) -> list[Side]:
        return [Side(Q, self.answer)]


@wraps(sft_sides)
def disguised(row: Mapping[str, Any]) -> list[Side]:
    return [Side(Q, " disguised")]


def written(text: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"Side": Side, "Q": Q}
    exec(f"def sides(row):\n    return [Side(Q, {text!r})]", scope)
    return scope["sides"]


READERS: list[tuple[Any, Any]] = [
    (reader(" a"), reader(" b")),
    (lambda row: [Side(Q, " a")], lambda row: [Side(Q, " b")]),
    (partial(tail_of, size=3), partial(tail_of, size=4)),
    (Reader(" a"), Reader(" b")),
    (Reader(" a").read, Reader(" b").read),
    (disguised, sft_sides),
    (written(" a"), written(" b")),
]


@pytest.fixture
def answers(make: Callable[..., Any], hh_dir: Path) -> Callable[..., tuple[list[int], int]]:
    """The tokens that a module trains on with a reader, and how many sets are cached by then."""

    def encode(sides: Any, cls: Any = HHSFTDataModule) -> tuple[list[int], int]:
        data = make(type(cls.__name__, (cls,), {"sides": staticmethod(sides)}), hh_dir)
        tokens = [token for batch in data.val_dataloader() for token in batch.input_ids.tolist()]
        return tokens, len(list((data._cache / "encoded").glob("*/manifest.json")))

    return encode


@pytest.mark.parametrize(("one", "other"), READERS)
def test_two_readers_never_share_a_set(answers: Callable[..., Any], one: Any, other: Any) -> None:
    first, second = answers(one)[0], answers(other)[0]
    assert first != second
    assert (answers(one)[0], answers(other)) == (first, (second, 4)), "each is found again"


def test_a_global_counts_as_it_is(
    answers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(limited)[0]
    monkeypatch.setitem(globals(), "LIMIT", 3)
    assert answers(limited)[0] != before


def test_an_edit_is_seen(
    answers: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the reader itself, of a function beside it, and of one in a module it imports."""
    monkeypatch.syspath_prepend(tmp_path)
    helper, own = tmp_path / "my_helper.py", tmp_path / "my_reader.py"
    helper.write_text("def clean(text):\n    return text.strip()\n")
    own.write_text(
        "import my_helper\nfrom alignkit.data.text.shapes import Side\n"
        f"Q = {Q!r}\n"
        "def beside(text):\n    return ' ' + my_helper.clean(text)\n"
        "def sides(row):\n    return [Side(Q, beside(row['chosen'][-9:]))]\n"
    )

    def load() -> ModuleType:
        importlib.invalidate_caches()
        for name in ("my_helper", "my_reader"):
            sys.modules.pop(name, None)
        return importlib.import_module("my_reader")

    seen = [answers(load().sides)]
    assert answers(load().sides) == seen[0], "loaded anew, it is the same"
    for path, old, new in [
        (helper, "text.strip()", "text.strip().upper()"),
        (own, "' ' + ", "' so ' + "),
        (own, "[-9:]", "[-7:]"),
    ]:
        path.write_text(path.read_text().replace(old, new) + "# longer, so no .pyc is taken\n")
        seen.append(answers(load().sides))
    tokens = [each[0] for each in seen]
    assert all(tokens[i] != tokens[j] for i in range(4) for j in range(i))
    assert [count for _, count in seen] == [2, 4, 6, 8]


def test_a_users_encoder_is_known_by_its_code_and_state(
    make: Callable[..., Any], hh_dir: Path
) -> None:
    def module(shout: bool, word: str) -> Any:
        class Encoder(DialogueEncoder):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.shout = shout

            def encode(self, drafts: Any, starts: Any = None) -> None:
                for draft in drafts:
                    answers = tuple(f" {word}" for _ in draft.dialogue.answers)
                    if self.shout:
                        answers = tuple(answer.upper() for answer in answers)
                    draft.dialogue = replace(draft.dialogue, answers=answers)
                super().encode(drafts, starts)

        class Module(HHSFTDataModule):
            def row_encoder(self, tokenizer: Any) -> Encoder:
                return Encoder(tokenizer, self.sides, max_length=512)

        return make(Module, hh_dir)

    def tokens(*args: Any) -> Any:
        return [batch.input_ids.tolist() for batch in module(*args).val_dataloader()]

    seen = [tokens(False, "salt"), tokens(True, "salt"), tokens(False, "rain")]
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert tokens(False, "salt") == seen[0]


def test_a_users_source_is_known_by_what_reads_it(make: Callable[..., Any], hh_dir: Path) -> None:
    def module(keep: int) -> Any:
        class Module(HHPreferenceDataModule):
            def find_splits(self, place: str) -> dict[str, list[Source]]:
                def some(source: Source) -> Source:
                    rows = source.rows
                    return replace(source, rows=lambda: (r for r in rows() if r[0] <= keep))

                found = super().find_splits(place)
                return {split: [some(each) for each in found[split]] for split in found}

        data = make(Module, hh_dir)
        data.setup()
        return data.stats["examples"]

    assert (module(5), module(7), module(5)) == (5, 7, 5)


def test_what_cannot_be_told_is_not_kept(
    answers: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    lock = threading.Lock()

    def sides(row: Mapping[str, Any]) -> list[Side]:
        with lock:
            return [Side(Q, " a")]

    with pytest.raises(UnknownContentError):
        code_identity(sides)
    with caplog.at_level(logging.WARNING, "alignkit.data"):
        _, kept = answers(sides)
    assert kept == 0
    assert "encoded anew in every process" in caplog.text and "a lock" in caplog.text


def test_the_package_is_known_by_its_source(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A copy of alignkit whose encoder is edited finds nothing that the original encoded."""
    import shutil

    import alignkit

    shutil.copytree(Path(alignkit.__file__).parent, tmp_path / "alignkit")
    rows = [{"prompt": f"q {i}", "completion": "Yes."} for i in range(30)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from alignkit.data import HHSFTDataModule\n"
        f"data = HHSFTDataModule({str(tokenizer_dir)!r}, 'a.jsonl', cache_dir='cache')\n"
        "print(next(iter(data.val_dataloader())).num_tokens)"
    )

    def run() -> int:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    before = run()
    sets = len(list((tmp_path / "cache" / "encoded").iterdir()))
    assert run() == before
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == sets
    path = tmp_path / "alignkit" / "data" / "text" / "shapes.py"
    text = path.read_text()
    path.write_text(
        text + "\n\n_old = sft_sides\n\n\ndef sft_sides(row):\n    return _old(row) and "
        "[Side('\\n\\nHuman: q\\n\\nAssistant:', ' ' + 'yes ' * 20)]\n"
    )
    assert run() > before


def test_the_package_digest_covers_all_that_makes_token_ids() -> None:
    """Every module that the data side loads, but for what deals examples or concerns weights."""
    home = Path(alignkit.__file__).parent
    weights = {"__init__", "fingerprint", "lean", "lean_proof", "quantize", "settings", "weights"}
    aside = {str(home / "models" / f"{name}.py") for name in weights}
    program = (
        "import sys, alignkit.data; print(*(module.__file__ for name, module in "
        "sys.modules.items() if name.startswith(('alignkit.data', 'alignkit.models'))), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = {path for path in done.stdout.splitlines() if Path(path).parent.name != "deal"}
    sources = set(code._sources())
    assert len(loaded) > 40, done.stderr
    assert loaded - sources <= aside
    assert max(os.path.getsize(path) for path in sources) < code._LARGEST
