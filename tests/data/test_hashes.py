"""A file's hash is taken over from the last run only while the file is what it was."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from alignkit.data.read import hashes
from alignkit.data.read.hashes import FileHashes, file_hash
from alignkit.utils import phases


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, with a clock that runs ten seconds ahead: nothing is too fresh."""
    seen: list[Path] = []

    def count(path: Path) -> str:
        seen.append(path)
        return file_hash(path)

    now = time.time_ns
    monkeypatch.setattr(hashes, "file_hash", count)
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + 10 * 10**9)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first"}\n')
    return path


def test_an_untouched_file_is_read_once(file: Path, tmp_path: Path, read: list[Path]) -> None:
    found = [FileHashes(tmp_path / "cache")(file) for _ in range(3)]
    assert set(found) == {file_hash(file)} and read == [file]


def test_a_long_read_gives_a_sign_of_life_and_an_untouched_file_starts_no_thread(
    file: Path,
    tmp_path: Path,
    read: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def slowly(path: Path) -> str:
        time.sleep(0.4)
        return file_hash(path)

    monkeypatch.setattr(phases, "AFTER_SECONDS", 0.05)
    monkeypatch.setattr(hashes, "file_hash", slowly)
    remembered = FileHashes(tmp_path / "cache")
    with caplog.at_level(logging.INFO, "alignkit"):
        found = remembered(file)
    assert caplog.messages == [f"reading {file} …"]
    monkeypatch.setattr(threading.Thread, "start", None)
    assert remembered(file) == found


def test_other_content_of_the_same_size_and_time_is_seen(
    file: Path, tmp_path: Path, read: list[Path]
) -> None:
    """Written in place and its mtime put back, as a restored backup or a careful editor does."""
    remembered = FileHashes(tmp_path / "cache")
    before, stat = remembered(file), file.stat()
    with file.open("r+") as opened:
        opened.write('{"text": "other"}\n')
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert remembered(file) == file_hash(file) != before


def test_another_file_in_its_place_is_seen(file: Path, tmp_path: Path, read: list[Path]) -> None:
    remembered = FileHashes(tmp_path / "cache")
    remembered(file)
    other = tmp_path / "other"
    other.write_text('{"text": "other"}\n')
    other.replace(file)
    assert remembered(file) == file_hash(file)


def test_a_fresh_file_is_not_remembered(file: Path, tmp_path: Path) -> None:
    """It may yet be written to within the tick of the file system's clock."""
    FileHashes(tmp_path / "cache")(file)
    assert not list(tmp_path.glob("cache/hashes/*"))


@pytest.mark.parametrize("note", ["", "null", "[1]", '{"state": 3}', '{"hash": "0"}', "\0\xff"])
def test_a_damaged_note_is_written_anew(
    file: Path, tmp_path: Path, read: list[Path], note: str
) -> None:
    remembered = FileHashes(tmp_path / "cache")
    remembered(file)
    (stored,) = tmp_path.glob("cache/hashes/*.json")
    stored.write_text(note)
    assert remembered(file) == remembered(file) == file_hash(file)
    assert read == [file] * 2


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, tmp_path: Path, read: list[Path]
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    remembered = FileHashes(tmp_path / "cache")
    assert remembered(file) == remembered(file) == file_hash(file)
    assert len(read) == 2
