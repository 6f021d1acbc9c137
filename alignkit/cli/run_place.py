"""Put the files of a stage's runs below the folder that ``--out`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import yaml

from alignkit.cli.config_file import flags_and_values, named_configs, read_config_file
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import output_path

_FLAG = "--trainer.logger"
_KINDS = ("TensorBoardLogger", "CSVLogger")  # those that number runs below their folder


def run_place(out: str) -> str:
    """Return a folder as a path that no parser takes for a number or a mapping.

    Raises:
        AlignkitError: It is empty.

    Example:
        >>> run_place("2024")
        './2024'
    """
    return os.path.join(".", output_path(out, "--out"))


def logger_at(place: str) -> str:
    """Return the value of ``--trainer.logger`` for the default logger at a place."""
    return json.dumps(
        {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": place, "name": ""},
        }
    )


def out_flags(place: str, others: Sequence[str]) -> Iterator[str]:
    """Yield the flags that move to a place what other flags and configurations put elsewhere.

    Args:
        place: The folder.
        others: The arguments of ``fit`` that were given.
    """
    asked = _logger_asked(others)
    kind = asked.get("class_path", "") if isinstance(asked, dict) else asked
    yield f"--trainer.default_root_dir={place}"
    if isinstance(kind, str):
        named = {"save_dir": place, **({"name": ""} if kind.endswith(_KINDS) else {})}
        yield f"{_FLAG}={json.dumps({'init_args': named})}"
    elif kind is not False:
        yield f"{_FLAG}={logger_at(place)}"


def _logger_asked(others: Sequence[str]) -> Any:
    """Return the last value that a flag or a configuration gives the logger."""
    asked: Any = _KINDS[0]
    for flag, value in flags_and_values(others):
        if flag == _FLAG:
            asked = yaml.safe_load(value)
        for path in named_configs(flag, value):
            with suppress(AlignkitError, TypeError, KeyError):  # it is reported later
                asked = read_config_file(path)["trainer"]["logger"]
    return asked
