"""Output files are whole or absent, and refused before the work."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from alignkit.errors import AlignkitError
from alignkit.report.files import check_output, write_file, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_text(path, "old ü")

    def half(temporary: Path) -> None:
        assert temporary.suffix == ".md"
        temporary.write_text("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match=r"disk full"):
        write_file(path, half)
    assert path.read_text(encoding="utf-8") == "old ü"
    assert os.listdir(tmp_path) == ["table.md"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("")
    write_text(ours, "")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_checks_make_the_directory_and_touch_no_file(tmp_path: Path) -> None:
    assert check_output(None, "json") is None
    path = check_output(str(tmp_path / "a" / "b.json"), "json")
    assert path == tmp_path / "a" / "b.json"
    assert path.parent.is_dir()
    assert not path.exists()


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
