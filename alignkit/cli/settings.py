"""Check a command's configuration files and trainer settings before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from alignkit.cli.launch import check_strategy
from alignkit.cli.own_loss import check_losses
from alignkit.errors import AlignkitError

_CONFIG_FLAGS = ("--config", "-c")
# The least values. Below these Lightning trains, but wrongly: a negative clip value reverses the
# gradient, and with an accumulation of 0 no step is ever taken.
_LEAST = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
}


def check_config_files(arguments: Sequence[str]) -> None:
    """Refuse a ``--config`` file that is not a YAML mapping, and a loss that its module lacks.

    The line names the file, of YAML the line in it too. A value that is not a file is left to the
    parser, which also takes YAML itself.

    Args:
        arguments: The command line after ``alignkit``.

    Raises:
        AlignkitError: The file cannot be read as YAML, or holds no options, or the loss is another
            module's.
    """
    configs = {}
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, given, inline = flag.partition("=")
        path = Path(inline if given else value)
        if name in _CONFIG_FLAGS and path.is_file():
            configs[str(path)] = _check_yaml(path)
    check_losses(arguments, configs)


def check_trainer(command: str, settings: Mapping[str, Any]) -> None:
    """Refuse trainer settings that Lightning accepts silently or refuses too late.

    Args:
        command: ``fit``, ``validate`` or ``test``.
        settings: The ``trainer`` part of the configuration, as parsed.

    Raises:
        AlignkitError: The strategy cannot train correctly, a number is out of range, or training
            has no end.
    """
    check_strategy(settings["strategy"])
    for name, least in _LEAST.items():
        value = settings[name]
        if value is not None and not value >= least:
            raise AlignkitError(f"trainer.{name}={value}: must be {least} or more")
    _check_duration(settings["max_time"])
    steps, ends = settings["max_steps"], ("max_epochs", "max_time", "fast_dev_run")
    if command == "fit" and steps == -1 and not any(_given(settings[name]) for name in ends):
        raise AlignkitError(
            "nothing says when training ends; give --trainer.max_epochs or --trainer.max_steps"
        )


def _check_duration(value: Any) -> None:
    """Refuse a time that is none; Lightning's line is about a callback that nobody asked for."""
    try:
        Timer(value)
    except MisconfigurationException:
        raise AlignkitError(
            f"trainer.max_time={value}: give days, hours, minutes and seconds as DD:HH:MM:SS"
        ) from None


def _given(value: Any) -> bool:
    return value is not None and value is not False


def _check_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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
