"""Restrict a module's state dict to the parameters that train.

The module uses hooks instead of overridden methods, because a wrapper (an average of the weights, a
user's module that holds ours) calls ``state_dict`` with a destination and a prefix, and never calls
a child's ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from alignkit.models import checkpoint as ckpt

_MODEL = "model."


def keep_trained_state(module: nn.Module) -> None:
    """Let a module's state dict hold the trainable parameters of its ``model`` and no others.

    Loading refuses other names and shapes before it changes anything, in one line.

    Args:
        module: A module with a submodule ``model``.
    """
    module.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_load_trained)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_clear_missing_keys)  # type: ignore[no-untyped-call]


def _leave_out_frozen(
    module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: Any
) -> None:
    model = module.get_submodule("model")
    kept = {f"{prefix}{_MODEL}{name}" for name in ckpt.trainable_state(model)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _load_trained(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    own = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
    state = ckpt.model_state({"state_dict": own})
    ckpt.load_trainable(module.get_submodule("model"), state, "ckpt_path")
    module.__dict__["_loaded_under"] = prefix


def _clear_missing_keys(module: nn.Module, keys: _IncompatibleKeys) -> None:
    """Remove frozen parameters from the missing keys; `_load_trained` has found all others."""
    prefix = module.__dict__.pop("_loaded_under")
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith(prefix)]
