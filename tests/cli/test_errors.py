"""One line, whoever raised the error."""

from __future__ import annotations

import errno

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from alignkit.cli_errors import INTERNAL, USER, one_line, parser_line
from alignkit.errors import AlignkitError

DUMP = """Does not validate against any of the Union subtypes
Subtypes: [<class 'Logger'>, <class 'bool'>]
Errors:
  - Problem with given class_path 'lightning.pytorch.loggers.WandbLogger':
      Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`
  - Expected a <class 'bool'>
Given value type: <class 'Namespace'>
Given value: Namespace(class_path='WandbLogger', init_args=Namespace(name='dpo'))"""


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (AlignkitError("data.path: none"), USER, ["data.path: none"]),
        (ValueError(DUMP), USER, ["wandb", "pip install wandb"]),
        (
            MisconfigurationException("No supported gpu backend found!"),
            USER,
            ["No supported gpu backend", "change --trainer.accelerator"],
        ),
        (
            MisconfigurationException("`val_check_interval` should be an integer."),
            USER,
            ["change --trainer.val_check_interval"],
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), USER, ["/runs/x: No space"]),
        (torch.OutOfMemoryError("CUDA out of memory."), INTERNAL, ["data.tokens_per_batch"]),
        (KeyError("momentum"), INTERNAL, ["internal error: KeyError", "--debug"]),
    ],
)
def test_every_error_is_one_line(error: Exception, status: int, parts: list[str]) -> None:
    line, found = one_line(error)
    assert found == status
    assert all(part in line for part in parts), line
    assert "\n" not in line and "Namespace(" not in line and "<class" not in line


def test_an_option_that_is_none_is_answered_with_the_nearest() -> None:
    options = ["trainer.max_steps", "trainer.max_epochs", "data.path"]
    line = parser_line("unrecognized arguments: --trainer.max_step=3", "alignkit fit", options)
    assert "did you mean --trainer.max_steps?" in str(line)
