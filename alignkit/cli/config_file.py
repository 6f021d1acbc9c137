"""Read a configuration file, and say in one line what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import AlignkitError

_FLAGS = ("--config", "-c")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file.

    Raises:
        AlignkitError: The file cannot be read as YAML, or holds no options.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AlignkitError(f"{path}: {error.strerror}; give a YAML file that fit takes") from None
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"{path}: is not UTF-8 text ({error.reason}); give a YAML file"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise AlignkitError(
            f"{where}: is not valid YAML ({getattr(error, 'problem', None) or error}); mend it"
        ) from None
    if content is None:
        raise AlignkitError(f"{path}: is empty; give a YAML file of options")
    if not isinstance(content, dict):
        raise AlignkitError(
            f"{path}: holds a {type(content).__name__}, not options; write `name: value` lines"
        )
    return content


def flags_and_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag with its value, as ``--flag value`` and ``--flag=value`` give it.

    Example:
        >>> list(flags_and_values(["--a=1", "--b", "2"]))
        [('--a', '1'), ('--b', '2')]
    """
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, given, inline = flag.partition("=")
        if name.startswith("-"):
            yield name, inline if given else value


def named_configs(flag: str, value: str) -> Iterator[Path]:
    """Yield the file that a flag names, if the flag is that of a configuration.

    A value that is not a file is left to the parser, which also takes YAML itself.
    """
    if flag in _FLAGS and Path(value).is_file():
        yield Path(value)
