"""Choose the model that a preference loss compares the policy with: ``model.reference``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from alignkit.engine import check_engine
from alignkit.errors import AlignkitError
from alignkit.lora import set_adapter
from alignkit.lora.adapter import adapter_layers, plain_modules
from alignkit.lora.identity import UNTRAINED, trained_fingerprint
from alignkit.models.checkpoint import load_policy
from alignkit.models.fingerprint import base_fingerprint
from alignkit.models.load import load_tokenizer
from alignkit.models.residual import is_widened, widen_residual
from alignkit.models.tokenizer import refuse_other_tokens
from alignkit.modules.reference import ReferenceModel, frozen_copy
from alignkit.utils.deferred import actual

COPY, BASE, NONE = "copy", "base", "none"
"""The choices that are no path."""


def resolve_choice(choice: str | None, loss: str, reads_reference: bool, trains_all: bool) -> str:
    """Return a choice of reference, where ``None`` is a copy if the loss reads one.

    Args:
        choice: What was asked for.
        loss: The loss's name.
        reads_reference: Whether the loss reads a reference.
        trains_all: Whether the whole model trains, without adapters.

    Raises:
        AlignkitError: The choice does not go with the loss, or with what trains.
    """
    if choice is None:
        return COPY if reads_reference else NONE
    if reads_reference and choice == NONE:
        raise AlignkitError(
            f"model.reference none: {loss} compares the policy with a reference; choose copy, base "
            "or a path, or a loss that reads none (SimPO, ORPO, CPO)"
        )
    if not reads_reference and choice != NONE:
        raise AlignkitError(
            f"model.reference {choice}: {loss} uses no reference; leave it out or choose none"
        )
    if choice == BASE and trains_all:
        raise AlignkitError(
            "model.reference base: the whole model trains (model.lora: null), so there are no "
            "adapters to switch off; choose copy, or give the path of the base"
        )
    return choice


def make_reference(
    choice: str, policy: PreTrainedModel, tokenizer: str, dtype: torch.dtype
) -> ReferenceModel:
    """Return the model that a choice other than a copy names.

    Args:
        choice: ``base``, or what `load_policy` takes.
        policy: The policy, with the weights that it has now.
        tokenizer: Where the policy's tokenizer lies.
        dtype: Dtype of a base that is loaded.

    Raises:
        AlignkitError: There is nothing at that path, it cannot be scored, or its tokens are not
            the policy's.
    """
    if choice == BASE:
        return without_adapters(policy)
    return loaded_from(choice, policy, tokenizer, dtype)


def without_adapters(policy: PreTrainedModel) -> ReferenceModel:
    """Return the policy's base alone, which shares its storage."""
    model = frozen_copy(policy)
    set_adapter(model, None)
    for layer in adapter_layers(model).values():
        layer.adapters = nn.ModuleDict()
    return ReferenceModel(model, UNTRAINED)


def loaded_from(
    path: str, policy: PreTrainedModel, tokenizer: str, dtype: torch.dtype
) -> ReferenceModel:
    """Load a reference, and let it share the policy's frozen parameters where they are equal."""
    where = f"model.reference {path}"
    if not Path(path).exists() and "/" not in path:
        raise AlignkitError(
            f"{where}: there is no such file or folder; choose copy, base or none, or give a "
            "checkpoint, an adapter or a model"
        )
    try:
        model, theirs = load_policy(path, dtype=dtype)
        refuse_other_tokens(theirs, load_tokenizer(tokenizer), tokenizer)
        if is_widened(policy):
            widen_residual(model)
        check_engine(model)
    except AlignkitError as error:
        raise AlignkitError(f"{where}: {error}") from error
    base, trained = base_fingerprint(model), trained_fingerprint(model)
    _share_equal_parameters(model, policy)
    return ReferenceModel(model, trained, "" if base == base_fingerprint(policy) else base)


def _share_equal_parameters(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    ours = plain_modules(policy)
    for path, module in plain_modules(model).items():
        for name, theirs in list(module.named_parameters(recurse=False)):
            own = ours[path]._parameters.get(name) if path in ours else None
            if own is None or own.requires_grad or own.dtype != theirs.dtype:
                continue
            if own.device == theirs.device and torch.equal(actual(own), actual(theirs)):
                setattr(module, name, own)
