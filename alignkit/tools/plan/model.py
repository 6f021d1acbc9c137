"""Build the models of a run without their weights: tensors that have a size and no content."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.engine.fp32 import outermost_blocks
from alignkit.engine.tail import assume_plain_tail
from alignkit.engine.verify import assume_packed
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.lora.adapter import plain_modules, replace_module
from alignkit.models.dropout import zero_dropout
from alignkit.models.lean import lean_modules
from alignkit.models.load import read_config
from alignkit.models.policy import checkpoint_activations
from alignkit.models.quantize import packable_layers
from alignkit.models.residual import widen_residual
from alignkit.modules.reference import frozen_copy
from alignkit.modules.reference_choice import BASE, COPY, NONE, without_adapters
from alignkit.tools.plan.packed import SIZED
from alignkit.tools.plan.settings import Settings
from alignkit.utils.autocast import HALF

# Upstream's signatures are partly untyped.
_CausalLM: Any = AutoModelForCausalLM


@dataclass(frozen=True)
class Weights:
    """Hold what a run's models take whatever the batch.

    Example:
        >>> Weights(base=500, trained=10, reference=10, loading=500, checking=100).at_rest
        520

    Attributes:
        base: Bytes of what does not train.
        trained: Bytes of what trains.
        reference: Bytes that the reference adds.
        loading: Bytes of the base while it is loaded.
        checking: Bytes of fp32 copies while scores are checked before training.
    """

    base: int
    trained: int
    reference: int
    loading: int
    checking: int

    @property
    def at_rest(self) -> int:
        """Return the bytes of all weights during training."""
        return self.base + self.trained + self.reference


@dataclass(frozen=True)
class Models:
    """Hold a run's simulated models, and what their weights take.

    Example:
        >>> Models(None, None, None, Weights(500, 10, 10, 500, 100), {"base": 125}).weights.at_rest
        520

    Attributes:
        mode: The mode in which their tensors compute.
        policy: The model that trains, in training mode.
        reference: Its frozen copy, or ``None``.
        weights: Bytes of the weights.
        parameters: Numbers of the ``base``'s parameters, a tied head once, and of the ``trained``.
    """

    mode: FakeTensorMode
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    weights: Weights
    parameters: dict[str, int]


def simulate_models(settings: Settings, device: torch.device) -> Models:
    """Build what a run with these settings would train and compare with.

    Args:
        settings: The run.
        device: Where its tensors pretend to lie.

    Raises:
        AlignkitError: The config cannot be read, or the adapter does not fit the model.
    """
    config = read_config(settings.base)
    with torch.device("meta"):
        policy: Any = _CausalLM.from_config(config, dtype=settings.dtype, trust_remote_code=False)
    loading = _bytes(policy)
    base_parameters = sum(p.numel() for p in policy.parameters())
    lean_modules(policy)
    if settings.residual == "float32":
        widen_residual(policy)
    _pack(policy, settings.quantize)
    _make_trainable(policy, settings)
    if settings.half is not None:
        policy.to(settings.half)
    if settings.checkpointing:
        checkpoint_activations(policy)
    reference = _reference(policy, settings.reference)
    trained = [p for p in policy.parameters() if p.requires_grad]
    models = Models(
        mode=FakeTensorMode(allow_non_fake_inputs=True),
        policy=policy,
        reference=reference,
        weights=Weights(
            base=_bytes(policy) - _sum(trained),
            trained=_sum(trained),
            reference=_bytes(policy, reference) - _bytes(policy),
            loading=0 if device.type == "cuda" else loading,  # on the host
            checking=_copies_in_fp32(policy),
        ),
        parameters={"base": base_parameters, "trained": sum(p.numel() for p in trained)},
    )
    fakes: dict[int, Tensor] = {}
    for model in filter(None, (policy, reference)):
        _make_fake(model, models.mode, device, fakes)
        assume_packed(model)
        assume_plain_tail(model)
    policy.train()
    return models


def _reference(policy: PreTrainedModel, choice: str) -> PreTrainedModel | None:
    if choice == NONE:
        return None
    if choice == COPY:
        return frozen_copy(policy)
    if choice == BASE:
        return without_adapters(policy).model
    other = copy.deepcopy(policy)  # a run shares what is equal, so that this is the most
    other.train(False)
    return other


def _pack(model: PreTrainedModel, to: str | None) -> None:
    if to is None:
        return
    modules = plain_modules(model)
    for path in packable_layers(model):
        linear = modules[path]
        assert isinstance(linear, nn.Linear)  # for the type checker
        replace_module(model, path, SIZED[to](linear))


def _make_trainable(model: PreTrainedModel, settings: Settings) -> None:
    if not settings.dropout:
        zero_dropout(model)
    lora = settings.lora
    if settings.start is not None and lora == "auto":
        lora = settings.start.own(model)
    if lora == "auto":
        lora = LoRAConfig()
    if lora is None:
        model.requires_grad_(True)
    else:
        with torch.device("meta"):
            inject_lora(model, lora)


def _make_fake(
    model: nn.Module, mode: FakeTensorMode, device: torch.device, fakes: dict[int, Tensor]
) -> None:
    """Put tensors that pretend to lie on a device in the places of meta tensors."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake: Tensor = FakeTensor(mode, tensor.detach().to("meta"), device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


def _copies_in_fp32(model: nn.Module) -> int:
    """Return the memory of the copies that `alignkit.engine.fp32.in_fp32` makes at once."""
    blocks = outermost_blocks(model)
    inside = [_half_numbers(list(block.parameters())) for block in blocks]
    within = {id(p) for block in blocks for p in block.parameters()}
    outside = _half_numbers([p for p in model.parameters() if id(p) not in within])
    return 4 * (outside + max(inside, default=0))


def _half_numbers(tensors: list[nn.Parameter]) -> int:
    return sum(t.numel() for t in tensors if t.dtype in HALF)


def _bytes(*models: nn.Module | None) -> int:
    tensors = {
        id(tensor): tensor
        for model in models
        if model is not None
        for tensor in (*model.parameters(), *model.buffers())
    }
    return _sum(list(tensors.values()))


def _sum(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
