"""Take files as sources of rows, by what their names say: one file, or a directory's splits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from alignkit.data.read.documents import document_rows, folder_source
from alignkit.data.read.hashes import file_hash
from alignkit.data.read.json_rows import json_rows, line_rows
from alignkit.data.read.opened import bare_suffix
from alignkit.data.read.rows import Rows, Source
from alignkit.data.read.saved import is_saved, saved_names, saved_shards
from alignkit.data.read.slices import example_of, pick_splits
from alignkit.data.read.split_names import (
    DOCUMENT_SUFFIXES,
    DOCUMENTS,
    FORMATS,
    ROW_SUFFIXES,
    SPLITS,
    SUFFIXES,
    named_files,
    names_offered,
    split_files,
)
from alignkit.data.read.tables import arrow_rows, csv_rows, parquet_rows
from alignkit.errors import AlignkitError

Hashes = Callable[[Path], str]
Splits = dict[str, list[Source]]

_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": line_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    **dict.fromkeys(DOCUMENTS, document_rows),
}


def file_source(path: Path, hashes: Hashes = file_hash) -> Source:
    """Return the rows of one file; of a text file, its one document.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.
        hashes: Gives the hash of its content.

    Raises:
        AlignkitError: No such file, an unknown suffix, or an empty file. Reading it raises the
            same, with ``file:line``, where it is damaged (a truncated gzip stream, say).
    """
    if not path.is_file():
        raise AlignkitError(f"{path}: no such file; give a file, a directory or a Hub id")
    if not path.name.endswith(SUFFIXES):
        known = ", ".join((*FORMATS, *DOCUMENTS))
        raise AlignkitError(f"{path}: unknown format; give one of {known}, as is or as .gz or .zst")
    if path.stat().st_size == 0:
        raise AlignkitError(f"{path}: the file is empty; give one with a row a line")
    read = _READERS[bare_suffix(path)]
    return Source(str(path), hashes(path), lambda: read(path))


def file_splits(path: Path, hashes: Hashes, asked: Collection[str] | None = None) -> Splits:
    """Return the rows of one file as ``train``, or by the names asked for: that one or its own.

    Unasked, ``test.jsonl`` is ``train`` alone: as both it would be measured on what it trains.

    Raises:
        AlignkitError: As `file_source`, or another name is asked for.
    """
    source = file_source(path, hashes)
    offered = dict.fromkeys(("train", *names_offered([path.name])))
    names = ["train"] if asked is None else pick_splits(str(path), offered, asked)
    return {name: [source] for name in names}


def directory_splits(
    directory: Path, hashes: Hashes = file_hash, asked: Collection[str] | None = None
) -> Splits:
    """Return the splits of a directory, from its files' names.

    ``train.jsonl``, ``test.jsonl.gz`` and the shards ``train-00000-of-00002.parquet`` name their
    split; ``valid``, ``val`` and ``dev`` mean ``validation``. Other files are left alone. Where
    all files are documents and none names a split, each is a row of ``train``. A copy of a Hub
    set has its files in ``data``, and what ``save_to_disk`` of the datasets library wrote says
    itself which they are.

    Args:
        directory: Where the files lie.
        hashes: Gives the hash of a file's content.
        asked: Names of the splits to read; default: the standard ones.

    Raises:
        AlignkitError: No file names a split, several claim one, or shards are missing.
    """
    if is_saved(directory):
        names = pick_splits(str(directory), saved_names(directory), asked)
        files = {name: saved_shards(directory, name) for name in names}
    else:
        directory = _home(directory)
        if asked is None and not _split_files(directory)[0]:
            return {"train": [_documents(directory, hashes)]}
        files = _named(directory, asked) if asked is not None else _split_files(directory)[0]
    return {name: [file_source(path, hashes) for path in paths] for name, paths in files.items()}


def files_not_read(directory: Path) -> list[str]:
    """Return the names of a directory's splits, or of files like them, that are left alone."""
    if is_saved(directory):
        return [name for name in saved_names(directory) if name not in SPLITS]
    return _split_files(_home(directory))[1]


def _home(directory: Path) -> Path:
    """Return where a directory's files of rows lie: in it or, of a copy of a Hub set, in data."""
    inside = directory / "data"
    beside = any(path.name.endswith(ROW_SUFFIXES) for path in directory.iterdir())
    return inside if inside.is_dir() and not beside else directory


def _file_names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.is_file()]


def _split_files(directory: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of a directory's standard splits, and those like them left alone."""
    try:
        splits, unread = split_files(_file_names(directory))
    except AlignkitError as error:
        raise AlignkitError(f"{directory}: {error}") from error
    return {split: [directory / name for name in names] for split, names in splits.items()}, unread


def _named(directory: Path, asked: Collection[str]) -> dict[str, list[Path]]:
    """Return the files of the splits that are asked for."""
    names = _file_names(directory)
    found: dict[str, list[Path]] = {}
    for split in asked:
        try:
            files = named_files(names, split) or split_files(names)[0].get(split, [])
        except AlignkitError as error:
            raise AlignkitError(f"{directory}: {error}") from error
        if not files:
            pick_splits(str(directory), names_offered(names), [split])
        found[split] = [directory / name for name in files]
    return found


def _documents(directory: Path, hashes: Hashes) -> Source:
    """Return the documents of a directory that holds nothing else.

    Raises:
        AlignkitError: It holds other files, or none.
    """
    shown = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    if shown and all(path.name.endswith(DOCUMENT_SUFFIXES) and path.is_file() for path in shown):
        return folder_source(directory, shown, hashes)
    names = names_offered(_file_names(directory))
    unread = ", ".join(_split_files(directory)[1])
    others = f"; {unread}: not read" if unread else ""
    raise AlignkitError(
        f"{directory}: no train.*, validation.* or test.* file ({', '.join(FORMATS)}, or shards "
        f"such as train-00000-of-00004.parquet){others}; name one of its files, or the splits to "
        f"read{example_of(names)}"
    )
