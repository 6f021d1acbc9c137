"""Compute content hashes of files, and keep them between runs while a file is unchanged.

Reading 10 GB only to find out that they are still the same would make every start wait. As git
does for its working tree, a hash is taken over from the last run while the file's size, inode and
times of change are what they were then; ``ctime`` moves with every write, whatever was done to
``mtime``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import xxhash

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import write_atomically
from alignkit.utils.phases import phase

# A file written to within one tick of its file system's clock keeps its times: only a file that
# has been left alone for longer is remembered (git's "racy" entries).
_SETTLED_NS = 2_000_000_000


class FileHashes:
    """Compute the hash of each file once, and keep it in the cache.

    Args:
        cache: The cache's directory; nothing is remembered where it cannot be written.
    """

    def __init__(self, cache: Path) -> None:
        self._home = cache / "hashes"

    def __call__(self, path: Path) -> str:
        """Return the hash of a file's content, 32 hex digits."""
        name = hashlib.blake2b(os.path.abspath(path).encode(), digest_size=16).hexdigest()
        note = self._home / f"{name}.json"
        before = _state(path)
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_bytes())
            if known["state"] == before:
                return str(known["hash"])
        with phase(f"reading {path}"):
            found = file_hash(path)
        settled = time.time_ns() - max(before[2:]) > _SETTLED_NS
        if settled and _state(path) == before:
            with suppress(AlignkitError):
                write_atomically(note, json.dumps({"state": before, "hash": found}))
        return found


def file_hash(path: Path) -> str:
    """Return the XXH3 hash of a file's content: a fortieth of SHA-256's time."""
    digest = xxhash.xxh3_128()
    add_file(digest, path)
    return digest.hexdigest()


def digest_of(content: bytes) -> str:
    """Return the XXH3 hash of some bytes, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(content)


def add_file(digest: xxhash.xxh3_128 | xxhash.xxh3_64, path: Path) -> None:
    """Add a file's content to a digest, through one buffer that stays in a core's cache."""
    buffer = memoryview(bytearray(2**16))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])


def _state(path: Path) -> list[int]:
    """Return a file's size and inode, and when it was written and changed, in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
