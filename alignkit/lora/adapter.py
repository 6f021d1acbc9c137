"""Define an adapted module: a frozen base and named adapters, of which one at most is active."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.lora.config import LoRAConfig
from alignkit.utils.autocast import HALF

FROZEN = ("start_A", "start_B")
"""Parameters of an adapter that never train: what PiSSA and OLoRA subtract."""


class Adapter(nn.Module):
    """Hold one adapter's parameters on one module, all in fp32.

    Attributes:
        config: The config, with the module's own ``r`` and ``alpha``.
        lora_A, lora_B: The low-rank factors, [I, R] and [R, O].
        start_A, start_B: The frozen first A and B, where the start is subtracted.
        magnitude: [O], the magnitude of each output, with DoRA.
        bias: [O], a trained copy of the base's bias.
    """

    def __init__(self, config: LoRAConfig, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=name not in FROZEN))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Move with the model, but stay in fp32 when the model is cast to half precision."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            halved = tensor.dtype == torch.float32 and moved.dtype in HALF
            return tensor.to(moved.device) if halved else moved

        super()._apply(keep_fp32, recurse)  # type: ignore[no-untyped-call]
        return self

    def get(self, name: str) -> nn.Parameter | None:
        """Return a parameter, or ``None`` where this adapter has none of that name."""
        return self._parameters.get(name)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, with the subtracted start as further columns: ``[A A₀] [B; -B₀]``."""
        a_IR, b_RO = self.get_parameter("lora_A"), self.get_parameter("lora_B")
        start_a, start_b = self.get("start_A"), self.get("start_B")
        if start_a is None or start_b is None:
            return a_IR, b_RO
        return torch.cat((a_IR, start_a), dim=1), torch.cat((b_RO, -start_b))


class AdapterLayer(nn.Module):
    """Define a module that has adapters beside its frozen base.

    Attributes:
        base: The wrapped module; `inject_lora` freezes it.
        adapters: The adapters by name.
        active: Name of the one in use; ``None``, or a name this layer lacks, for the base alone.
        originals: While an adapter is merged, the parameters of the base that it replaced.
    """

    active: str | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.originals = nn.ParameterDict()
        self.active = None
        self.training = base.training

    @abstractmethod
    def adapted(self, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        """Run the base with an adapter."""

    @abstractmethod
    def merged_parameters(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return parameters of the base with which it alone does what base and adapter do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the active adapter, or alone."""
        adapter = self.current()
        if adapter is not None and not self.merged:
            return self.adapted(adapter, *args, **kwargs)
        if adapter is None and self.merged:
            return torch.func.functional_call(self.base, dict(self.originals), args, kwargs)
        return self.base(*args, **kwargs)

    def current(self) -> Adapter | None:
        """Return the adapter in use, or ``None``."""
        if self.active is None or self.active not in self.adapters:
            return None
        return self.adapter(self.active)

    def adapter(self, name: str) -> Adapter:
        """Return an adapter this layer has."""
        adapter = self.adapters[name]
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{name!r} is a {type(adapter).__name__}, not an Adapter")
        return adapter

    def original(self, name: str) -> nn.Parameter:
        """Return a parameter of the base as it is without any adapter, merged or not."""
        return self.originals[name] if name in self.originals else self.base.get_parameter(name)

    @property
    def merged(self) -> bool:
        """Tell whether the base holds the active adapter's merged parameters."""
        return len(self.originals) > 0

    def merge(self) -> None:
        """Merge the active adapter into the base, and keep the parameters that it replaces."""
        adapter = self.current()
        if adapter is None or self.merged:
            return
        for name, value in self.merged_parameters(adapter).items():
            self.originals[name] = self.base.get_parameter(name)
            setattr(self.base, name, nn.Parameter(value, requires_grad=False))

    def unmerge(self) -> None:
        """Put back the parameters that `merge` replaced, the same objects."""
        for name, original in self.originals.items():
            setattr(self.base, name, original)
        self.originals = nn.ParameterDict()

    def extra_repr(self) -> str:
        """Show which adapter is in use, and whether it is merged."""
        return f"active={self.active!r}, merged={self.merged}"

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base, so that code that reads ``norm.eps`` still works."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class TrainedModule(AdapterLayer):
    """Train some of a module's own parameters in full (``modules_to_save`` and ``bias="all"``).

    The trained copies are fp32 and stand in for the module's parameters during its forward pass,
    rounded to their dtype; the originals are kept, for when the adapter is off.
    """

    def __init__(
        self, base: nn.Module, config: LoRAConfig, trained: tuple[str, ...], name: str = "default"
    ) -> None:
        super().__init__(base)
        values = {
            key: base.get_parameter(key).detach().to(torch.float32, copy=True) for key in trained
        }
        self.adapters[name] = Adapter(config, values)
        self.active = name

    def adapted(self, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the adapter's parameters in place of its own."""
        return torch.func.functional_call(self.base, self._rounded(adapter), args, kwargs)

    @torch.no_grad()
    def merged_parameters(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return the trained parameters in the base's dtype."""
        return {name: value.clone() for name, value in self._rounded(adapter).items()}

    def _rounded(self, adapter: Adapter) -> dict[str, Tensor]:
        return {
            name: value.to(self.base.get_parameter(name).dtype)
            for name, value in adapter.named_parameters()
        }

    def __getattr__(self, name: str) -> Any:
        """Return a trained parameter, such as ``head.weight``, or an attribute of the base."""
        adapter = None if name in ("base", "adapters", "active") else self.current()
        trained = adapter.get(name) if adapter is not None else None
        return super().__getattr__(name) if trained is None else trained


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapted modules by the path each has in the model without adapters."""
    layers: dict[str, AdapterLayer] = {}
    _walk(model, "", layers, {})
    return layers


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the model as it is without adapters, by path."""
    modules: dict[str, nn.Module] = {}
    _walk(model, "", {}, modules)
    return modules


def _walk(
    module: nn.Module, path: str, layers: dict[str, AdapterLayer], modules: dict[str, nn.Module]
) -> None:
    if isinstance(module, AdapterLayer):
        layers[path] = module
        _walk(module.base, path, layers, modules)
        return
    modules[path] = module
    for name, child in module.named_children():
        _walk(child, f"{path}.{name}" if path else name, layers, modules)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replace the module at a path, as paths are in the model without adapters."""
    parent_path, _, name = path.rpartition(".")
    setattr(plain_modules(model)[parent_path], name, new)
