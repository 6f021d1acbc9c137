"""Keep the weights of a model's blocks in their files until a block is computed or sharded.

A parameter that is deferred lies on the meta device, where it has a shape and no content, and knows
how to read its value. A block with such parameters reads them when it is called and lets go of them
afterwards, so that a model can be scored while one block at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class DeferredParameter(nn.Parameter):
    """Stand for a parameter whose value is read when it is asked for.

    Args:
        like: A tensor of its shape and dtype.
        read: Returns the value, in any dtype.
    """

    _read: Callable[[], Tensor]
    _loaded: torch.dtype

    def __new__(
        cls, like: Tensor, read: Callable[[], Tensor], requires_grad: bool = True
    ) -> DeferredParameter:
        """Return a parameter without content."""
        empty = torch.empty_like(like, device="meta")
        made: DeferredParameter = torch.Tensor._make_subclass(cls, empty, requires_grad)
        made._read, made._loaded = read, like.dtype
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def read(self) -> Tensor:
        """Return the value, rounded as a model is that was loaded in one dtype and then cast."""
        return self._read().to(self._loaded).to(self.dtype)

    def write(self, value: Tensor) -> None:
        """Take another value, which is kept as it is given."""
        kept = value.detach()
        self._read, self._loaded = lambda: kept, self.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredParameter:
        """Return another parameter of the same value; a value that is kept is not copied."""
        if id(self) not in memo:
            twin = DeferredParameter(self.detach(), self._read, self.requires_grad)
            twin._loaded = self._loaded
            memo[id(self)] = twin
        found: DeferredParameter = memo[id(self)]
        return found


class _DeferredBlock(nn.Module):
    """Define a block that holds its weights while it is called; `defer` mixes it with a class."""

    original: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Read the weights, call the block with its hooks, and let go of them again."""
        if torch.is_grad_enabled():  # a gradient needs parameters that stay
            hold(self)
            return self(*args, **kwargs)
        with held(self):
            return super().__call__(*args, **kwargs)


_classes: dict[type[nn.Module], type[_DeferredBlock]] = {}


def defer(block: nn.Module, readers: dict[str, Callable[[], Tensor]]) -> None:
    """Put deferred parameters in the places of a block's own.

    Args:
        block: Changed in place; it stays an instance of its class.
        readers: What reads the value of each parameter, by its name within the block.
    """
    for name, read in readers.items():
        path, _, last = name.rpartition(".")
        table = block.get_submodule(path)._parameters
        own = table[last]
        assert own is not None
        table[last] = DeferredParameter(own, read, own.requires_grad)
    kind = type(block)
    if kind not in _classes:
        body = {"original": kind, "__module__": kind.__module__}
        _classes[kind] = type(f"Deferred{kind.__name__}", (_DeferredBlock, kind), body)
    block.__class__ = _classes[kind]


def actual(tensor: Tensor) -> Tensor:
    """Return a tensor's value: of a deferred parameter what it reads, of any other itself."""
    return tensor.read() if isinstance(tensor, DeferredParameter) else tensor


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter another value, deferred or not."""
    if isinstance(parameter, DeferredParameter):
        parameter.write(value)
    else:
        parameter.copy_(value)


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module for a while."""
    before = list(_places(module))
    try:
        _fill(before)
        yield
    finally:
        for table, name, parameter in before:
            table[name] = parameter


def hold(*modules: nn.Module) -> None:
    """Hold the weights of modules from here on; parameters that they share stay shared."""
    _fill([place for module in modules for place in _places(module)])
    for module in modules:
        for part in module.modules():
            if isinstance(part, _DeferredBlock):
                part.__class__ = part.original  # type: ignore[assignment]


def _places(
    module: nn.Module,
) -> Iterator[tuple[dict[str, nn.Parameter | None], str, DeferredParameter]]:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DeferredParameter):
                yield part._parameters, name, parameter


def _fill(places: list[tuple[dict[str, nn.Parameter | None], str, DeferredParameter]]) -> None:
    values: dict[int, nn.Parameter] = {}
    for table, name, parameter in places:
        if id(parameter) not in values:
            values[id(parameter)] = nn.Parameter(parameter.read(), parameter.requires_grad)
        table[name] = values[id(parameter)]
