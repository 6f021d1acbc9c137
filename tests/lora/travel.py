"""Where adapters of every causal language model of transformers go, and what becomes of them.

The adapters' truth is the merged model: its logits, and the gradient of its whole weights, from
which those of A and B follow by hand: ∂L/∂A = s ∂L/∂W Bᵀ and ∂L/∂B = s Aᵀ ∂L/∂W.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, merge_lora
from alignkit.lora.adapter import adapter_layers
from alignkit.lora.layer import LoRALinear
from alignkit.models.export import export
from tests.engine.families import tiny_family

IDS = torch.tensor([[3, 17, 98, 45, 6, 71, 22, 118, 9, 54, 33, 80]])
EXACT = 1e-4
"""Largest difference of logits and gradients, as a part of the largest entry."""
UNADAPTED = "none:"
"""How the targets of a type begin that takes no adapter."""
RELOADED, UNTRIED = "exact", "not tried"


@dataclass(frozen=True)
class Travel:
    """What became of a type's adapters, ``targets="all-linear"``.

    Attributes:
        targets: Names of the adapted layers, ``q_proj, v_proj``, or why there are none.
        left_out: What alignkit says it leaves out; empty for nothing.
        peft: ``exact``, or the reason why PEFT's directory was not written.
        merged: The same of a merged transformers directory.
        wrong: What is not as it should be, one line each.
    """

    targets: str = UNTRIED
    left_out: str = ""
    peft: str = UNTRIED
    merged: str = UNTRIED
    wrong: tuple[str, ...] = ()


def travel(kind: str, place: Path, targets: Any = "all-linear") -> Travel:
    """Adapt a tiny model of one type, train-step it, export it both ways and read it back."""
    from alignkit.lora.targets import all_linear

    base = tiny_family(kind)
    base.requires_grad_(False)
    model = copy.deepcopy(base)
    try:
        inject_lora(model, LoRAConfig(r=4, targets=targets))
    except AlignkitError as error:
        return Travel(f"{UNADAPTED} {error}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    names = dict.fromkeys(path.rpartition(".")[2] for path in adapter_layers(model))
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        plain = base(IDS, use_cache=False).logits
        changed = _difference(plain, wanted)
    wrong = [
        f"gradients: {fault}"
        for training in (False, True)
        if (fault := _gradients(model, training))
    ]
    if changed < EXACT:
        wrong.append("the adapter changes nothing")

    def reloaded(to: Any) -> str:
        try:
            export(model, place / to, to)
        except AlignkitError as error:
            return str(error)
        if to == "peft":
            again: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(place / to))
        else:
            again = type(base).from_pretrained(place / to)
        with torch.no_grad():
            found = again.eval()(input_ids=IDS, use_cache=False).logits
        off = _difference(found, wanted)
        if off > EXACT:
            wrong.append(f"{to}: off by {off:.1e} (the adapter changes {changed:.1e})")
        return RELOADED

    ways = [reloaded(to) for to in ("peft", "merged")]
    return Travel(", ".join(names), str(all_linear(base)), *ways, tuple(wrong))


def _gradients(model: PreTrainedModel, training: bool) -> str:
    """Compare the adapters' gradients with those that the merged weights' imply."""
    with _without_dropout(model, training):
        loss = _loss(model)
        with torch.no_grad():
            if _difference(_loss(model), loss.detach()) > EXACT:
                return ""  # noise of its own: nothing to compare
        loss.backward()
    merged = copy.deepcopy(model)
    merge_lora(merged)
    layers = {
        path: layer
        for path, layer in adapter_layers(merged).items()
        if isinstance(layer, LoRALinear)
    }
    for layer in layers.values():
        layer.base.weight.requires_grad_()
    with _without_dropout(merged, training):
        _loss(merged).backward()
    worst, where = 0.0, ""
    scale = max(
        (p.grad.abs().max().item() for p in model.parameters() if p.grad is not None), default=0.0
    )
    for path, layer in adapter_layers(model).items():
        assert isinstance(layer, LoRALinear)
        adapter = layer.adapter("default")
        weight = layers[path].base.weight
        whole = torch.zeros_like(weight) if weight.grad is None else weight.grad
        whole_IO = whole.t() if isinstance(layer.base, nn.Linear) else whole
        for parameter, truth in (
            (adapter.lora_A, whole_IO @ adapter.lora_B.t()),
            (adapter.lora_B, adapter.lora_A.t() @ whole_IO),
        ):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            off = (found - adapter.config.scale * truth).abs().max().item()
            if off > worst:
                worst, where = off, path
    model.zero_grad()
    if scale == 0:
        return "none at all"
    return f"off by {worst / scale:.1e} at {where}" if worst > 10 * EXACT * scale else ""


def _loss(model: PreTrainedModel) -> Tensor:
    logps = model(IDS, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return -logps.gather(1, IDS[0, 1:, None]).mean()


@contextmanager
def _without_dropout(model: PreTrainedModel, training: bool) -> Iterator[None]:
    """Run as in training, with nothing drawn."""
    kept = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in kept:
        module.p = 0.0
    model.train(training)
    try:
        yield
    finally:
        model.eval()
        for module, p in kept:
            module.p = p


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
