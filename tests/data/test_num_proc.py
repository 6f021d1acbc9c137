"""Rows encoded in several processes: the files of one process, its counts and its errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import HHPreferenceDataModule, HHSFTDataModule, Policies, TextDataModule
from alignkit.data.encode import workers
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.read.rows import Source
from alignkit.data.text.shapes import Side, sft_sides
from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer
from tests.data.conftest import pair, sentence, write_jsonl

ROWS = 61  # in chunks of 7, the last one not full
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ROWS", 7)


def dying_sides(row: Mapping[str, Any]) -> list[Side]:
    if "dies" in row["chosen"] and multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return sft_sides(row)


class Dying(HHSFTDataModule):
    """Ends the process that reads a certain row."""

    sides = staticmethod(dying_sides)


@pytest.fixture
def defective(tmp_path: Path) -> Path:
    """Pairs with every kind of row that is counted, dropped or shortened, in several chunks."""
    rng = random.Random(1)
    rows: list[Any] = [pair(rng, rng.randint(1, 5)) for _ in range(ROWS)]
    for line in (3, 30, 31, 58):
        rows[line] = rows[2]  # the same prompt again
    rows[9]["chosen"] = rows[9]["chosen"].rpartition(" Yes")[0]  # empty
    rows[11]["rejected"] = rows[11]["chosen"]
    rows[20]["chosen"] += " \x00"
    rows[22] = {"chosen": 5}
    rows[40]["chosen"] += " salt" * 300
    rows[41]["extra"] = "not read"
    rows[50]["rejected"] += "\n\nHuman: And?"
    path = tmp_path / "defective"
    path.mkdir()
    lines = [json.dumps(row) for row in rows]
    lines[25] = "{not JSON"
    (path / "train.jsonl").write_text("\n".join(lines))
    write_jsonl(path / "test.jsonl", [pair(rng) for _ in range(9)])
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rng = random.Random(2)
    path = tmp_path / "documents"
    path.mkdir()
    texts = [sentence(rng, 1, 90) for _ in range(ROWS)]
    texts[12], texts[33] = "", texts[4]
    write_jsonl(path / "train.jsonl", [{"text": text} for text in texts])
    return path


def files(cache: Path) -> dict[str, bytes]:
    """Every file of the encoded sets in a cache, by its name below it."""
    home = cache / "encoded"
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


LENIENT = Policies(bad_rows="drop", repeated_prompts="drop")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (HHPreferenceDataModule, {"max_length": 90, "policies": LENIENT}),
        (HHSFTDataModule, {"turns": "all", "policies": LENIENT, "prompt_format": "chat"}),
        (TextDataModule, {"packing": "best_fit", "block_size": 32, "policies": LENIENT}),
    ],
    ids=["pairs", "chat", "documents"],
)
def test_any_number_of_processes_makes_the_same_files(
    module: Callable[..., Any],
    options: dict[str, Any],
    defective: Path,
    documents: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    """Manifests hold the counts, the lines of defects and the shapes, so these are the same too."""
    if options.get("prompt_format") == "chat":
        tokenizer_dir = Path(shutil.copytree(tokenizer_dir, tmp_path / "chat"))
        (tokenizer_dir / "chat_template.jinja").write_text(TEMPLATE)
    source = documents if module is TextDataModule else defective
    found = []
    for count in (1, 2):
        cache = tmp_path / f"cache{count}"
        data = module(
            str(tokenizer_dir), str(source), num_proc=count, cache_dir=str(cache), **options
        )
        data.setup()
        assert data.stats["repeated_prompts"] > 0 and data.stats["dropped"] > 1
        found.append(files(cache))
    one, several = found
    assert any(name.endswith("tokens.bin") and content for name, content in one.items())
    assert one == several


def test_an_encoded_set_starts_no_process(
    make: Callable[..., Any], hh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(HHSFTDataModule, str(hh_dir)).setup()
    monkeypatch.setattr(workers.Workers, "_start", lambda _: pytest.fail("it is there already"))
    make(HHSFTDataModule, str(hh_dir), num_proc=2).setup()


def test_the_first_bad_row_is_told_whatever_encodes_it(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    """Its ids alone show what is wrong with it, and the next row's text shows that at once."""
    rng = random.Random(3)
    rows: list[Any] = [pair(rng) for _ in range(ROWS)]
    rows[44]["chosen"] += " salt" * 300
    rows[45] = {"chosen": 5}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    policies = Policies(bad_rows="error", too_long="error")
    told = []
    for count in (1, 2):
        with pytest.raises(AlignkitError) as raised:
            make(
                HHPreferenceDataModule, str(path), num_proc=count, max_length=90, policies=policies
            ).setup()
        told.append(str(raised.value))
    assert told[0] == told[1]
    assert told[0].startswith(f"{path}:45: ")


def test_a_process_that_dies_is_told_in_one_line(make: Callable[..., Any], tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = [pair(rng) for _ in range(ROWS)]
    rows[40]["chosen"] += " dies"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(AlignkitError) as raised:
        make(Dying, str(path), num_proc=2).setup()
    assert str(raised.value) == (
        f"{path}: a process that encodes it was killed by signal 9; if memory ran out, "
        "lower data.num_proc"
    )
    assert not files(tmp_path / "cache")


def test_rows_are_read_a_chunk_a_process_ahead(
    tokenizer_dir: Path, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever the file's size, this is what memory holds of it."""
    rng = random.Random(5)
    read: list[int] = []

    def rows() -> Iterator[tuple[int, Any]]:
        for line in range(1, 8 * ROWS):
            read.append(line)
            yield line, pair(rng)

    written: list[int] = []

    class Writer:
        examples = 0

        def add(self, example: Any, line: int) -> None:
            written.append(line)
            # Two chunks with the processes, one written, one read to follow it.
            assert len(read) <= line + 4 * 7

    encoder = make(HHSFTDataModule, str(tmp_path)).row_encoder(load_tokenizer(str(tokenizer_dir)))
    with workers.Workers(encoder, 2) as two:
        encoder.write(Source("made", "0", rows), Writer(), two)
    assert written == read == list(range(1, 8 * ROWS))


def test_what_cannot_be_sent_is_refused(make: Callable[..., Any], hh_dir: Path) -> None:
    class Local(HHSFTDataModule):
        sides = staticmethod(lambda row: sft_sides(row))

    with pytest.raises(AlignkitError, match=r"data.num_proc=2: the encoder cannot be sent"):
        make(Local, str(hh_dir), num_proc=2).setup()


def test_an_encoder_that_shares_no_work_is_refused(make: Callable[..., Any], hh_dir: Path) -> None:
    class Alone(DialogueEncoder):
        def write(self, source: Any, writer: Any) -> dict[str, Any]:  # type: ignore[override]
            return super().write(source, writer)

    class Module(HHSFTDataModule):
        def row_encoder(self, tokenizer: Any) -> Alone:
            return Alone(tokenizer, self.sides, max_length=512)

    with pytest.raises(AlignkitError, match=r"data.num_proc=2: .*Alone.write takes no `workers`"):
        make(Module, str(hh_dir), num_proc=2).setup()
    with pytest.raises(AlignkitError, match=r"data.num_proc=0: must be 1 or more"):
        make(Module, str(hh_dir), num_proc=0)
