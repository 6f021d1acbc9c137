"""Find the configuration file that a refused option was read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alignkit.cli.config_file import flags_and_values, named_configs, read_config_file
from alignkit.cli.messages import OptionError
from alignkit.errors import AlignkitError


@contextmanager
def naming_file(arguments: Sequence[str]) -> Iterator[None]:
    """Put the file's name before the error about one of its options.

    Args:
        arguments: The command and its arguments.

    Raises:
        AlignkitError: An option is refused, with the command's own help in the line.
    """
    try:
        yield
    except OptionError as error:
        if error.command == "alignkit" and arguments[0].isidentifier():
            error.command = f"alignkit {arguments[0]}"
        given = [*flags_and_values(arguments)]
        if any(flag == f"--{error.option}" for flag, _ in given):
            raise
        for flag, value in given:
            for path in named_configs(flag, value):
                if _holds(read_config_file(path), error.option.split(".")):
                    raise AlignkitError(f"{path}: {error}") from None
        raise


def _holds(settings: Any, keys: Sequence[str]) -> bool:
    """Tell whether settings hold an option, whose name leaves ``init_args`` out."""
    if not keys:
        return True
    if not isinstance(settings, dict):
        return False
    here = keys[0] in settings and _holds(settings[keys[0]], keys[1:])
    return here or _holds(settings.get("init_args"), keys)
