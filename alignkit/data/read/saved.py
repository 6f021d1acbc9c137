"""Find the files of directories that ``save_to_disk`` of the datasets library wrote.

A saved ``Dataset`` is Arrow files listed in its ``state.json``; a saved ``DatasetDict`` is a
folder for each split, listed in ``dataset_dict.json``. Only these lists and the files are read:
nothing that was saved is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError

_STATE = "state.json"
_INFO = "dataset_info.json"
_DICT = "dataset_dict.json"


def is_saved(directory: Path) -> bool:
    """Tell whether a directory is a saved ``Dataset`` or ``DatasetDict``."""
    if (directory / _DICT).is_file():
        return True
    return (directory / _STATE).is_file() and (directory / _INFO).is_file()


def saved_names(directory: Path) -> list[str]:
    """Return the names of a saved set's splits; that of a ``Dataset`` is ``train``.

    Raises:
        AlignkitError: What lists them is damaged.
    """
    if not (directory / _DICT).is_file():
        return ["train"]
    listed = _entry(directory / _DICT, "splits")
    return [_plain(name, directory / _DICT) for name in listed]


def saved_shards(directory: Path, split: str) -> list[Path]:
    """Return the files of one of `saved_names`, in order.

    Raises:
        AlignkitError: What lists them is damaged, or lists none.
    """
    home = directory / split if (directory / _DICT).is_file() else directory
    state = home / _STATE
    listed = _entry(state, "_data_files")
    names = [file.get("filename") if isinstance(file, dict) else None for file in listed]
    if not names:
        raise AlignkitError(f"{state}: the set holds no rows")
    return [home / _plain(name, state) for name in names]


def _entry(path: Path, name: str) -> list[Any]:
    try:
        value = json.loads(path.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AlignkitError(
            f"{path}: not what save_to_disk writes ({type(error).__name__}: {error}); save it again"
        ) from error
    if not isinstance(value, list):
        raise AlignkitError(f"{path}: `{name}` is not a list; save it again")
    return value


def _plain(name: Any, path: Path) -> str:
    """Check that a file name stays in its directory, and return it.

    Raises:
        AlignkitError: It does not, or it is no name.
    """
    if not isinstance(name, str) or Path(name).name != name:
        raise AlignkitError(f"{path}: {name!r} is no name of a file beside it; save it again")
    return name
