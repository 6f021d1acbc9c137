"""Output files are whole or absent, and refused before the work."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

import alignkit
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import check_output, make_writable_folder, write_atomically

SOURCE = Path(alignkit.__file__).parent


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, "old ü")

    def half(file: BinaryIO) -> None:
        file.write(b"ne")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match=r"no more"):
        write_atomically(path, half)
    assert path.read_text(encoding="utf-8") == "old ü"
    assert os.listdir(tmp_path) == ["table.md"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("")
    write_atomically(ours, "")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system says no in the same place."""
    path = tmp_path / "weights"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(AlignkitError, match=r"weights: cannot be written \(File too large\)"):
            write_atomically(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights"]


def test_a_place_without_room_for_files_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignkitError, match=r"cannot be written \(.+\); make room"):
        write_atomically(tmp_path / "file" / "x", b"")
    with pytest.raises(AlignkitError, match=r"cannot be written"):
        write_atomically(tmp_path, b"")
    with pytest.raises(AlignkitError, match=r"file/runs: cannot be written \("):
        make_writable_folder(tmp_path / "file" / "runs")


def test_devices_and_pipes_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_atomically(pipe, "through")
    assert reader.communicate(timeout=20)[0] == "through"
    assert pipe.is_fifo()


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    """Killed with half of the new content written: the name still holds the old."""
    path = tmp_path / "weights"
    write_atomically(path, b"old")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from alignkit.utils.atomic import write_atomically\n"
        "def half(file):\n"
        "    file.write(b'n' * 100_000); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), half)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == -9
    assert path.read_bytes() == b"old"
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".partial"]


def test_nothing_in_the_package_writes_files_in_another_way() -> None:
    """One function for all files; the encoded sets are folders with checksums of their own."""
    ways = (
        ".write_text(",
        ".write_bytes(",
        "os.replace(",
        "NamedTemporaryFile(",
        "save_file(",
        "torch.save(",
    )
    allowed = {
        "utils/atomic.py",
        "cli/config.py",  # on a remote file system, through fsspec
        "data/keep/cache.py",
        "data/keep/store.py",
        "utils/memory.py",
        "models/archive.py",
        "models/find.py",  # in memory
    }
    for source in SOURCE.rglob("*.py"):
        if source.relative_to(SOURCE).as_posix() not in allowed:
            found = [way for way in ways if way in source.read_text(encoding="utf-8")]
            assert not found, source


def test_checks_make_the_directory_and_touch_no_file(tmp_path: Path) -> None:
    assert check_output(None, "json") is None
    path = check_output(str(tmp_path / "a" / "b.json"), "json")
    assert path == tmp_path / "a" / "b.json"
    assert not path.parent.exists()  # a command that fails leaves nothing


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignkitError, match=r"json '.*': is a directory"):
        check_output(str(tmp_path), "json")
    with pytest.raises(AlignkitError, match=r"plot '.*': its directory cannot be made"):
        check_output(str(tmp_path / "file" / "x.png"), "plot")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AlignkitError, match=r"cannot be written to"):
        check_output(str(tmp_path / "x.json"), "json")
