"""The line about an exception that no command here can be made to raise at will."""

from __future__ import annotations

import errno

import pytest
import torch

from alignkit.cli.errors import FAILED, USER, explain
from alignkit.cli.messages import plain
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
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            USER,
            ["/runs/x", "No space left"],
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), FAILED, ["data.tokens_per_batch"]),
        (KeyError("momentum"), FAILED, ["internal error: KeyError", "--debug"]),
    ],
)
def test_every_error_is_one_line(error: Exception, status: int, parts: list[str]) -> None:
    line, found = explain(error)
    assert found == status
    assert all(part in line for part in parts), line
    assert "\n" not in line


def test_a_dump_of_the_configuration_is_left_out() -> None:
    line = plain(DUMP)
    assert "wandb>=0.12.10" in line
    assert "\n" not in line
    assert "Namespace(" not in line
    assert "<class" not in line
