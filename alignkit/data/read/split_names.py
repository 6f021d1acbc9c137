"""Tell which files of a directory make up its splits, by their names alone.

A split is one file (``train.jsonl``) or one whole set of numbered shards
(``train-00000-of-00004.parquet``). Whatever else begins like a split (``train_prefs.jsonl``,
``train.backup.jsonl``) is somebody's choice to make: it is named, and read where ``data.splits``
asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from alignkit.errors import AlignkitError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DOCUMENTS = (".txt", ".md")
"""Files each of which is one document."""


def _packed(*formats: str) -> tuple[str, ...]:
    return tuple(f"{suffix}{packed}" for suffix in formats for packed in ("", ".gz", ".zst"))


ROW_SUFFIXES = _packed(*FORMATS)
DOCUMENT_SUFFIXES = _packed(*DOCUMENTS)
SUFFIXES = (*ROW_SUFFIXES, *DOCUMENT_SUFFIXES)
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
_ANY_FILE = re.compile(rf"(.+?)(?:{_SHARD})?({_SUFFIX})", re.DOTALL)
_LIKE_A_SPLIT = re.compile(rf"(?:{_WORD}).*(?:{_SUFFIX})", re.IGNORECASE | re.DOTALL)
_ABOUT = re.compile(r"readme|licen[sc]e|notice|citation|changelog", re.IGNORECASE)


class _Set(NamedTuple):
    """Hold what the files of one set share: the split's word, how shards count, the suffix."""

    word: str
    separator: str | None
    total: str | None
    suffix: str


def split_files(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the files of each split, and those that begin like a split but are not read.

    Args:
        names: The names of a directory's files.

    Raises:
        AlignkitError: Two files, or sets of shards, claim one split; shards are missing.
    """
    names = sorted(names)
    of_rows = [name for name in names if name.endswith(ROW_SUFFIXES)]
    sets = _sets_of(of_rows, _SPLIT_FILE)
    like = [name for name in of_rows if _LIKE_A_SPLIT.fullmatch(name)]
    if not sets and not like:
        documents = [name for name in names if name.endswith(DOCUMENT_SUFFIXES)]
        sets = _sets_of(documents, _SPLIT_FILE)
        like = [name for name in documents if sets and not _ABOUT.match(name)]
    unread = [name for name in like if not _SPLIT_FILE.fullmatch(name)]
    claims: dict[str, list[list[str]]] = {}
    for key, members in sets.items():
        if key.separator and key.total is None and members[0][0] > 1:
            unread += [name for _, name in members]  # the years 2023 and 2024, say
        else:
            claims.setdefault(_WORDS[key.word], []).append(_whole(key, members))
    splits = {split: _only(split, claims[split]) for split in SPLITS if split in claims}
    return splits, sorted(unread)


def named_files(names: Iterable[str], wanted: str) -> list[str]:
    """Return the files of one split by the name that they bear; none where there are none.

    Args:
        names: The names of a directory's files.
        wanted: What stands before the number of a shard or the suffix, or a file's whole name.

    Raises:
        AlignkitError: As `split_files`.
    """
    names = sorted(names)
    if wanted in names and wanted.endswith(SUFFIXES):
        return [wanted]
    pattern = re.compile(rf"({re.escape(wanted)})(?:{_SHARD})?({_SUFFIX})")
    claims = [_whole(key, members) for key, members in _sets_of(names, pattern).items()]
    return _only(wanted, claims) if claims else []


def names_offered(names: Iterable[str]) -> list[str]:
    """Return the names by which `named_files` finds a directory's files of rows."""
    found = (_ANY_FILE.fullmatch(name) for name in names if name.endswith(ROW_SUFFIXES))
    return sorted({match[1] for match in found if match})


def held_out_name(name: str) -> str:
    """Return how a file's name calls a split that is held out, such as ``val``; empty if not so."""
    match = _SPLIT_FILE.fullmatch(name)
    return match[1] if match and _WORDS[match[1]] != "train" else ""


def _sets_of(names: Iterable[str], pattern: re.Pattern[str]) -> dict[_Set, list[tuple[int, str]]]:
    """Return the files that a pattern fits, by what those of one set have in common."""
    sets: dict[_Set, list[tuple[int, str]]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            word, separator, index, total, suffix = match.groups()
            members = sets.setdefault(_Set(word, separator, total, suffix), [])
            members.append((int(index or 0), name))
    return sets


def _whole(key: _Set, members: list[tuple[int, str]]) -> list[str]:
    """Return the names of one set in the order of their numbers, and refuse one with gaps."""
    members.sort()
    if key.separator:
        _check_shards(key, members)
    return [name for _, name in members]


def _only(split: str, claims: list[list[str]]) -> list[str]:
    if len(claims) > 1:
        told = " and ".join(map(_shown, claims))
        raise AlignkitError(
            f"{told} all claim to be the {split} split; keep one, or give data.path the "
            "files to read"
        )
    return claims[0]


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
