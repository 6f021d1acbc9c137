"""List what the target ``all-linear`` adapts in a model, and what it leaves out and why.

It adapts the linear layers of the language model that are called as layers, except the output head
and routers. Everything else that holds a matrix is listed by name, so that it is plain, for
example, where a model's experts are not adapted.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from alignkit.lora.adapter import plain_modules
from alignkit.lora.kinds import is_linear

EXPERTS = "experts, kept as raw parameters"
RAW = "raw parameters"
ROUTER = "routers"
TOWER = "no part of the language model"
READ = "weights that are read by other code"
OTHER = "layers of another kind"
_SHOWN = 12


@dataclass(frozen=True)
class Parts:
    """List a model's matrices that ``all-linear`` adapts, and those that it leaves out.

    Example:
        >>> found = Parts(("layers.0.self_attn.q_proj",), {"layers.0.mlp.gate": ROUTER})
        >>> print(found)
        mlp.gate (routers)

    Attributes:
        adapted: Paths of the linear layers that are adapted, in the model's order.
        left_out: What is not, each with the reason: paths of layers that could be named as
            targets, or of parameters. Norms, embeddings and the output head are not listed.
    """

    adapted: tuple[str, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """List what is left out, by reason: ``mlp.gate (routers), …``."""
        counts = Counter((reason, _kind(path)) for path, reason in self.left_out.items())
        reasons: dict[str, list[str]] = {}
        for reason, kind in counts:
            reasons.setdefault(reason, []).append(kind)
        return "; ".join(
            f"{', '.join(kinds[:_SHOWN])}{' …' if len(kinds) > _SHOWN else ''} ({reason})"
            for reason, kinds in reasons.items()
        )


def parts(model: nn.Module, head: str | None) -> Parts:
    """Divide a model's matrices into those that ``all-linear`` adapts and those it leaves out.

    Args:
        model: With or without adapters.
        head: Path of its output head.
    """
    modules = plain_modules(model)
    towers = _towers(model, modules)
    adapted: list[str] = []
    left_out: dict[str, str] = {}
    for path, module in modules.items():
        matrices = _matrices(module)
        if path == head or not matrices:
            continue
        tower = next((tower for tower in towers if _is_within(path, tower)), None)
        if tower is not None:
            left_out[tower] = TOWER
        elif is_router(path, modules):
            left_out[path] = ROUTER
        elif is_linear(module):
            if is_weight_read(path, modules):
                left_out[path] = READ
            else:
                adapted.append(path)
        elif matrices == ["weight"] and not module._modules:
            left_out[path] = OTHER
        else:
            reason = EXPERTS if "expert" in path else RAW
            left_out |= {f"{path}.{name}" if path else name: reason for name in matrices}
    return Parts(tuple(adapted), left_out)


def _matrices(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that map or scale, embeddings' left out."""
    if isinstance(module, nn.Embedding):
        return []
    if is_linear(module):
        return ["weight"]
    own = module.named_parameters(recurse=False)
    return [name for name, value in own if sum(size > 1 for size in value.shape) > 1]


def is_router(path: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a module chooses or weighs experts.

    It lies in something named a router, or is a gate beside experts.
    """
    names = path.split(".")
    for depth, name in enumerate(names):
        if "router" in name:
            return True
        if name == "gate" or name.endswith("_gate"):
            parent = modules.get(".".join(names[:depth]))
            if parent is not None and any("experts" in child for child in parent._modules):
                return True
    return False


def is_weight_read(path: str, modules: dict[str, nn.Module], partly: bool = False) -> bool:
    """Tell whether the module that holds a layer reads the layer's weight, by its source.

    Mamba's mixers do, in kernels that fuse the product with what follows. Adapters are exact there
    (see `LowRankLayer.weight`), but not PEFT's, and no dropout reaches them.

    Args:
        path: The layer's.
        modules: All modules of the model by path.
        partly: Count slices and attributes of a weight as well, ``dense.weight.dtype``.
    """
    parent, _, name = path.rpartition(".")
    source = _source(type(modules[parent])) if parent in modules else ""  # type: ignore[arg-type]
    part = "" if partly else r"(?!\[|\.(?!T\b|t\b|mT\b|float\b|to\b))"
    return re.search(rf"\bself\.{re.escape(name)}\.weight\b{part}", source) is not None


@cache
def _source(cls: type[nn.Module]) -> str:
    """Return a class's source; nothing where it has none, in a notebook or a compiled package."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _towers(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the paths of a backbone's other parts than its text decoder, such as vision towers."""
    if not isinstance(model, PreTrainedModel):
        return []
    paths = {id(module): path for path, module in modules.items()}
    towers = [
        path
        for path, module in modules.items()
        if path and isinstance(module, PreTrainedModel) and module.main_input_name != "input_ids"
    ]
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    backbone = paths.get(id(model.base_model), "")
    inside = paths.get(id(decoder), "")
    if backbone and inside and isinstance(decoder, PreTrainedModel):
        while inside != backbone and inside.startswith(f"{backbone}."):
            inside, _, taken = inside.rpartition(".")
            towers += [
                f"{inside}.{name}" for name, _ in modules[inside].named_children() if name != taken
            ]
    return [tower for tower in towers if not _is_within(paths.get(id(decoder), ""), tower)]


def _is_within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _kind(path: str) -> str:
    """Return a path's part after the block, ``mlp.gate`` of ``model.layers.0.mlp.gate``."""
    parts_of_path = path.split(".")
    last = max((i for i, part in enumerate(parts_of_path) if part.isdecimal()), default=-1)
    return ".".join(parts_of_path[last + 1 :] or parts_of_path)
