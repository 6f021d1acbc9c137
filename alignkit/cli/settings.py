"""Check a command's configuration files and trainer settings before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from alignkit.cli.config_file import flags_and_values, named_configs, read_config_file
from alignkit.cli.launch import check_strategy
from alignkit.cli.near import did_you_mean
from alignkit.cli.own_loss import check_losses
from alignkit.errors import AlignkitError

# The least values. Below these Lightning trains, but wrongly: a negative clip value reverses the
# gradient, and with an accumulation of 0 no step is ever taken.
_LEAST = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
    "min_epochs": 0,
    "min_steps": 0,
}


_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def check_config_files(arguments: Sequence[str]) -> None:
    """Refuse a ``--config`` file that is not a YAML mapping, and a loss that its module lacks.

    The line names the file, of YAML the line in it too.

    Args:
        arguments: The command line after ``alignkit``.

    Raises:
        AlignkitError: The file cannot be read as YAML, or holds no options, or the loss is another
            module's.
    """
    configs = {}
    for flag, value in flags_and_values(arguments):
        for path in named_configs(flag, value):
            configs[str(path)] = read_config_file(path)
            _check_classes(configs[str(path)], str(path))
    check_losses(arguments, configs)


def _check_classes(settings: Any, where: str) -> None:
    """Refuse other keys beside a class; the parser's line would not name them."""
    if isinstance(settings, list):
        for each in settings:
            _check_classes(each, where)
    if isinstance(settings, dict):
        for name, value in settings.items():
            if "class_path" in settings and name not in _CLASS_KEYS:
                near = did_you_mean(str(name), _CLASS_KEYS)
                raise AlignkitError(
                    f"{where}: {name}: no such key beside class_path of {settings['class_path']}"
                    f"{near}"
                )
            _check_classes(value, where)


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
    often = settings["val_check_interval"]
    if isinstance(often, int | float) and not often > 0:
        raise AlignkitError(
            f"trainer.val_check_interval={often}: must be above 0; --trainer.limit_val_batches 0 "
            "turns validation off"
        )
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
