"""Which files of a directory make up its splits, by their names alone.

A split is one file (``train.jsonl``) or one whole set of numbered shards
(``train-00000-of-00004.parquet``). Whatever else begins like a split (``train_prefs.jsonl``,
``train.backup.jsonl``) is somebody's choice to make: it is named, and not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from alignkit.errors import AlignkitError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = tuple(f"{suffix}{packed}" for suffix in FORMATS for packed in ("", ".gz", ".zst"))
"""The files that can be read."""

SPLITS = ("train", "validation", "test")

_WORDS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_WORD = "|".join(_WORDS)
_SUFFIX = "|".join(map(re.escape, SUFFIXES))
# Names of the Hub's shards may end in a hash, each in its own.
_SHARD = r"([-_.])(\d+)(?:[-_]of[-_](\d+)(?:-[0-9a-f]{8,64})?)?"
_SPLIT_FILE = re.compile(rf"({_WORD})(?:{_SHARD})?({_SUFFIX})")
_LIKE_A_SPLIT = re.compile(rf"(?:{_WORD}).*(?:{_SUFFIX})", re.IGNORECASE | re.DOTALL)


class _Set(NamedTuple):
    """What the files of one set have in common: the split's word, how shards count, the suffix."""

    word: str
    separator: str | None
    total: str | None
    suffix: str


def split_files(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The files of each split, and those that begin like a split but are not read.

    Args:
        names: Of a directory's files.

    Raises:
        AlignkitError: Two files, or sets of shards, claim one split; shards are missing.
    """
    sets: dict[_Set, list[tuple[int, str]]] = {}
    unread = []
    for name in sorted(names):
        if match := _SPLIT_FILE.fullmatch(name):
            word, separator, index, total, suffix = match.groups()
            members = sets.setdefault(_Set(word, separator, total, suffix), [])
            members.append((int(index or 0), name))
        elif _LIKE_A_SPLIT.fullmatch(name):
            unread.append(name)
    splits: dict[str, list[list[str]]] = {}
    for key, members in sets.items():
        members.sort()
        listed = [name for _, name in members]
        if key.separator and key.total is None and members[0][0] > 1:
            unread += listed  # the years 2023 and 2024, say
            continue
        if key.separator:
            _check_shards(key, members)
        splits.setdefault(_WORDS[key.word], []).append(listed)
    for split, claims in splits.items():
        if len(claims) > 1:
            told = " and ".join(_shown(listed) for listed in claims)
            raise AlignkitError(
                f"{told} all claim to be the {split} split; keep one, or give data.path the "
                "files to read"
            )
    return {name: splits[name][0] for name in SPLITS if name in splits}, sorted(unread)


def _check_shards(key: _Set, members: list[tuple[int, str]]) -> None:
    """Refuse a set of shards that is not whole: counted from 0 or from 1, none missing or twice."""
    found = [index for index, _ in members]
    if key.total is None:
        first, last = found[0], found[-1] + 1
    else:
        first = int(found[-1] == int(key.total))
        last = first + int(key.total)
    missing = sorted(set(range(first, last)) - set(found))
    if missing:
        listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise AlignkitError(
            f"{_shown([name for _, name in members])}: shards are missing (number {listed}); "
            "fetch them, or give data.path the files to read"
        )
    if len(found) != last - first:
        raise AlignkitError(
            f"{_shown([name for _, name in members])}: some shards are there twice or number "
            f"more than {last - first}; keep one set, or give data.path the files to read"
        )


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
