"""Read from a fit's configuration what decides how much memory a step takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from torch.optim import AdamW, Optimizer

from alignkit.cli.launch import shards_blocks
from alignkit.data.dialogues import PreferenceDataModule, UnpairedDataModule
from alignkit.data.documents import TextDataModule
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.models.find import find_checkpoint
from alignkit.models.start import Choice, Start, find_start
from alignkit.modules.reference_choice import COPY, NONE
from alignkit.modules.referenced import ReferencedModule
from alignkit.objectives.values import rebuilt

_TRUE = {
    "bf16-true": torch.bfloat16,
    "bf16": None,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "64": torch.float64,
}


@dataclass(frozen=True)
class Settings:
    """Hold what of a fit's configuration decides its memory.

    Example:
        >>> Settings("SFTModule", "gpt2", quantize="nf4").longest
        512

    Attributes:
        stage: Name of the module's class.
        base: The base model, as `AlignmentModule` takes it.
        dtype: Of the base's weights as loaded.
        half: What the trainer casts the base to, ``None`` for nothing.
        mixed: Autocast's dtype, ``None`` without.
        precision: The trainer's precision.
        quantize: How the base's linear layers are packed, ``None`` for not.
        lora: The adapter, ``auto`` or ``None``.
        start: The weights to start from, ``None`` without.
        dropout: Whether the base keeps its dropout.
        checkpointing: Whether blocks compute their activations again.
        residual: Dtype in which blocks add up.
        optimizer: Makes the optimizer of some parameters.
        reference: The model that scores every batch beside the policy, as in `DPOModule`.
        responses: Answers to a prompt.
        prompted: Whether examples have prompts.
        longest: Most tokens of a prompt with one answer, or of a document.
        tokens: The configuration's ``tokens_per_batch``.
        accumulates: Whether gradients live over several micro-batches.
        ranks: Processes on this machine.
        gpus: Whether the trainer may take GPUs.
    """

    stage: str
    base: str
    dtype: torch.dtype = torch.float32
    half: torch.dtype | None = None
    mixed: torch.dtype | None = None
    precision: str = "32-true"
    quantize: str | None = None
    lora: Choice = "auto"
    start: Start | None = None
    dropout: bool = False
    checkpointing: bool = False
    residual: str = "weights"
    optimizer: Callable[[list[Any]], Optimizer] = AdamW
    reference: str = NONE
    responses: int = 1
    prompted: bool = True
    longest: int = 512
    tokens: int = 4096
    accumulates: bool = False
    ranks: int = 1
    gpus: bool = False


def read_settings(config: Namespace) -> Settings:
    """Return the settings of a parsed configuration.

    Args:
        config: As ``alignkit fit`` parses it, with ``model``, ``data`` and ``trainer``.

    Raises:
        AlignkitError: ``init_from`` is needed for the adapter, and is not there; or the trainer
            shards its models.
    """
    stage, model = _class_and_arguments(config.model)
    source, data = _class_and_arguments(config.data)
    trainer = _plain(config.trainer)
    if shards_blocks(trainer.get("strategy") or "auto"):
        raise AlignkitError(
            "trainer.strategy: plan counts models that every process holds whole; leave the "
            "strategy out, and see docs/cluster.md for what a process holds of a sharded one"
        )
    precision = str(trainer.get("precision") or "32-true")
    gpus = trainer.get("accelerator") not in ("cpu",) and torch.cuda.is_available()
    lora = model.get("lora", "auto")
    if isinstance(lora, Mapping):
        lora = LoRAConfig.from_dict(lora)
    place = model.get("init_from") if lora == "auto" else None
    pairs = issubclass(source, (PreferenceDataModule, UnpairedDataModule))
    return Settings(
        stage=stage.__name__,
        base=model["base"],
        dtype=getattr(torch, model.get("dtype", "float32")),
        half=_TRUE.get(precision),
        mixed=_autocast(precision, gpus),
        precision=precision,
        quantize=model.get("quantize"),
        lora=lora,
        start=None if place is None else find_start(find_checkpoint(place)),
        dropout=bool(model.get("dropout", False)),
        residual=model.get("residual", "weights"),
        checkpointing=bool(model.get("activation_checkpointing", False)),
        optimizer=_optimizer(model.get("optimizer")),
        reference=_reference(stage, model),
        responses=2 if pairs else 1,
        prompted=not issubclass(source, TextDataModule),
        longest=int(data.get("block_size") or data.get("max_length") or 512),
        tokens=int(data.get("tokens_per_batch", 4096)),
        accumulates=(trainer.get("accumulate_grad_batches") or 1) > 1,
        ranks=_ranks(trainer.get("devices", "auto"), gpus),
        gpus=gpus,
    )


def _class_and_arguments(part: Namespace) -> tuple[type, dict[str, Any]]:
    arguments = _plain(part)
    given = {**(arguments.get("init_args") or {}), **(arguments.get("dict_kwargs") or {})}
    return _class_at(arguments["class_path"]), given


def _plain(value: Any) -> Any:
    """Return parsed values as dictionaries, those in lists as well."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _autocast(precision: str, gpus: bool) -> torch.dtype | None:
    if precision in ("bf16-mixed", "bf16"):
        return torch.bfloat16
    if precision in ("16-mixed", "16"):
        return torch.float16 if gpus else torch.bfloat16  # as Lightning chooses
    return None


def _optimizer(chosen: Mapping[str, Any] | None) -> Callable[[list[Any]], Optimizer]:
    if chosen is None:
        return lambda parameters: AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    kind: Any = _class_at(chosen["class_path"])
    options = {**(chosen.get("init_args") or {}), **(chosen.get("dict_kwargs") or {})}
    return lambda parameters: kind(parameters, **options)


def _reference(stage: type, model: Mapping[str, Any]) -> str:
    if not issubclass(stage, ReferencedModule):
        return NONE
    choice = model.get("reference")
    if choice is not None:
        return str(choice)
    loss = model.get("loss")
    if isinstance(loss, Mapping) and "class_path" in loss:  # KTO's are its parameters alone
        loss = _loss(loss)
    return COPY if getattr(loss, "uses_reference", True) else NONE


def _loss(chosen: Mapping[str, Any]) -> Any:
    return _class_at(chosen["class_path"])(**rebuilt(chosen.get("init_args") or {}, _loss))


def _ranks(devices: Any, gpus: bool) -> int:
    available = torch.cuda.device_count() if gpus else 1
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(available, 1)
    text = str(devices)
    return len(text.strip(",").split(",")) if "," in text else max(int(text), 1)
