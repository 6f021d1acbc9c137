"""A checkpoint's archive: what was written is what is read, or it is refused."""

from __future__ import annotations

import os
import random
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.models.archive import read_archive, write_archive

SEAL_BYTES = 46


def content() -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(17, 33) for i in range(4)}
    return {"state_dict": tensors, "global_step": 3, "alignkit": {"module": "x"}, "name": "text"}


def same(found: dict[str, Any]) -> bool:
    expected = content()
    tensors, others = found.pop("state_dict"), expected.pop("state_dict")
    equal = all(torch.equal(tensors[name], value) for name, value in others.items())
    return equal and list(tensors) == list(others) and found == expected


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "a.ckpt", content())
    return tmp_path / "a.ckpt"


def refused(path: Path, data: bytes) -> bool:
    """Whether an archive of these bytes is refused in one line; one that is read must be right."""
    path.write_bytes(data)
    try:
        found = read_archive(path)
    except AlignkitError as error:
        line = str(error)
    else:
        assert same(found)
        return False
    assert str(path) in line and "\n" not in line
    return True


def test_torch_reads_it_as_any_other(archive: Path) -> None:
    assert same(torch.load(archive, weights_only=True))
    assert same(torch.load(archive, weights_only=True, mmap=True))
    assert same(read_archive(archive))


def test_two_flipped_bytes_are_refused_wherever_they_are(archive: Path) -> None:
    """500 pairs over the whole file; torch by itself reads most of them without a word."""
    whole, draw = archive.read_bytes(), random.Random(0)
    unnoticed = 0
    for _ in range(500):
        data = bytearray(whole)
        for place in draw.sample(range(len(data)), 2):
            data[place] ^= draw.randrange(1, 256)
        assert refused(archive, bytes(data))
        with suppress(Exception):  # what torch notices
            unnoticed += not same(torch.load(archive, weights_only=True))
    assert unnoticed > 250


def test_a_flip_in_the_seal_does_not_open_the_door_to_another(archive: Path) -> None:
    """Without its mark an archive is held against the checksums of its records."""
    whole, draw = archive.read_bytes(), random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        data[len(data) - SEAL_BYTES + draw.randrange(14)] ^= 1
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        refused(archive, bytes(data))


def test_an_archive_cut_short_anywhere_is_refused(archive: Path) -> None:
    whole = archive.read_bytes()
    for end in range(0, len(whole) - SEAL_BYTES, 101):
        assert refused(archive, whole[:end])
    for end in range(len(whole) - SEAL_BYTES, len(whole)):  # the seal alone is missing
        refused(archive, whole[:end])


def test_what_torch_wrote_is_read_but_not_where_a_record_is_damaged(archive: Path) -> None:
    torch.save(content(), archive)
    assert same(read_archive(archive))
    whole = archive.read_bytes()
    record = whole.index(content()["state_dict"]["layer.2"].numpy().tobytes())
    data = bytearray(whole)
    data[record + 5] ^= 1
    data[record + 9] ^= 1
    assert refused(archive, bytes(data))


def test_a_url_is_read_through_fsspec(archive: Path) -> None:
    import fsspec

    with fsspec.open("memory://checkpoints/a.ckpt", "wb") as file:
        file.write(archive.read_bytes())
    assert same(read_archive("memory://checkpoints/a.ckpt"))
    with pytest.raises(AlignkitError, match=r"memory://no\.ckpt: no such checkpoint"):
        read_archive("memory://no.ckpt")
    assert same(read_archive(f"file://{archive}"))


def test_a_full_disk_is_one_line_and_keeps_the_last_one(archive: Path) -> None:
    """Where torch says "unexpected pos 704 vs 598"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(AlignkitError, match=r"a\.ckpt: cannot be written \(File too large\)"):
            write_archive(archive, {"state_dict": {"w": torch.zeros(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(read_archive(archive))
    assert os.listdir(archive.parent) == ["a.ckpt"]
