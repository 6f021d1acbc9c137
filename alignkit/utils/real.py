"""Keep a layout of index tensors real while a model's own tensors are simulated."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch._subclasses.fake_tensor import unset_fake_temporarily

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_real_tensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function that computes with real tensors within ``FakeTensorMode`` too.

    `alignkit plan` runs a step on tensors without content. What lays out a row needs the content of
    its indices, which are small and are there.
    """

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run
