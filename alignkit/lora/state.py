"""Return the adapters' tensors by stable names, and load them into a model that they fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import adapter_layers
from alignkit.utils.finite import first_nonfinite

_SHOWN = 3


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every adapter's tensors (not copies) as ``<module path>.adapters.<name>.<parameter>``.

    The module path is the one in the model without adapters, so the names do not depend on what
    else was wrapped.
    """
    return {
        f"{path}.adapters.{name}": parameter.detach()
        for path, layer in adapter_layers(model).items()
        for name, parameter in layer.adapters.named_parameters()
    }


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors of `adapter_state_dict` into a model with the same adapters.

    Raises:
        AlignkitError: Names or shapes differ, or a tensor holds NaN or infinity; the model is then
            unchanged.
    """
    own = adapter_state_dict(model)
    refuse_differences(state, {name: tuple(t.shape) for name, t in own.items()}, "adapter state")
    bad = first_nonfinite(state.items())
    if bad is not None:
        raise AlignkitError(f"adapter state: {bad} holds NaN or infinity; use an earlier one")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def refuse_differences(
    given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Refuse tensors that are not exactly those expected, in one line that says which."""
    wrong = [
        f"{name} is {_shape(given[name].shape)}, the model's is {_shape(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    problems = [
        f"{label} {_some(names)}"
        for label, names in (
            ("missing", [name for name in expected if name not in given]),
            ("unexpected", [name for name in given if name not in expected]),
            ("wrong shape:", wrong),
        )
        if names
    ]
    if problems:
        raise AlignkitError(f"{what} does not fit the model: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
