"""Compute logits of hidden states as the model's tail does, which is its part after the backbone.

Many tails are one product with the head and a scalar function of it: Cohere scales logits and
Gemma 2 caps them. Such a curve is found by trying it on random states, and logits are then computed
from the head alone. Any other tail is the model's own code, which runs on the scored positions.

Shape letters: N scored tokens, n tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from alignkit.engine.fp32 import in_fp32
from alignkit.engine.head import PLAIN, Curve, TokenScores, token_scores
from alignkit.engine.interface import backbone

_CURVE = "_alignkit_curve"
"""Attribute of a model that keeps what was found."""
_EXACT = "_alignkit_exact_logits"
"""Attribute of a model whose head's products are not rounded."""
_OWN_CODE = "own"
"""Stands in place of a curve where the model's own code computes its logits."""
_TRIED_SPREADS = (0.1, 3.0, 30.0)
"""Standard deviations, in nats, of the products on which a curve must hold."""
_TOLERANCE = 1e-5
"""Largest difference of logits, as a share of their spread."""


def head_scores(
    model: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, stats: bool = False
) -> TokenScores:
    """Score tokens with the logits that a model computes of hidden states, without a [T, V] tensor.

    Args:
        model: The first call tries out its tail.
        hidden_ND: [N, D] output of its backbone at the positions that predict the tokens.
        target_N: [N] int64 token ids.
        stats: As in `token_scores`.
    """
    curve: Curve | str | None = getattr(model, _CURVE, None)
    if curve is None:
        with torch.inference_mode(False), torch.no_grad(), in_fp32(model, hidden_ND.device):
            curve = _find_curve(model, hidden_ND.shape[-1]) or _OWN_CODE
        setattr(model, _CURVE, curve)
    if isinstance(curve, str):
        return token_scores(_OwnForward(model), hidden_ND, target_N, stats)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    exact = getattr(model, _EXACT, False)
    return token_scores(head, hidden_ND, target_N, stats, curve, exact)


def use_exact_logits(model: PreTrainedModel) -> None:
    """Keep the products of a model's frozen head in fp32, whatever its dtype."""
    setattr(model, _EXACT, True)


def assume_plain_tail(model: PreTrainedModel) -> None:
    """Record that logits are the head's products, untried, for a model without content."""
    setattr(model, _CURVE, PLAIN)


class _OwnForward(nn.Module):
    """Run a model's forward on hidden states in place of tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule, which would bring its parameters

    def forward(self, hidden_nD: Tensor) -> Tensor:
        """Compute [n, V] logits."""
        logits_nV = _own_logits(self.__dict__["model"], hidden_nD)
        if logits_nV is None:
            raise ValueError("it makes its logits without the part that makes hidden states")
        return logits_nV


def _own_logits(model: PreTrainedModel, hidden_nD: Tensor) -> Tensor | None:
    """Compute [n, V] logits by a model's forward; ``None`` where it skips its backbone."""
    given = _GivenStates(hidden_nD)
    # The forward may read the shape of the ids, but not the ids.
    ids = torch.zeros(1, len(hidden_nD), dtype=torch.int64, device=hidden_nD.device)
    with _replaced(_hidden_state_modules(model), model, given):
        # Without the model's own hooks: a strategy's may be at work on this very call.
        output = model.forward(input_ids=ids, use_cache=False)
    logits_nV: Tensor = output.logits[0]
    return logits_nV if given.taken else None


def _hidden_state_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the backbone, and the decoder inside it that some heads call directly."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    makers: list[nn.Module] = [backbone(model)]
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        makers.append(decoder)
    return makers


class _GivenStates:
    """Hold hidden states to return in the backbone's place, and whether they were returned."""

    def __init__(self, hidden_nD: Tensor) -> None:
        self.hidden_1nD = hidden_nD[None]
        self.taken = False


@dataclass
class _GivenOutput(BaseModelOutputWithPast):
    """Hold hidden states alone; any other output that a head passes on is ``None``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _StandIn(nn.Module):
    """Return given hidden states, with the attributes of the module that it stands in for."""

    def __init__(self, real: nn.Module, given: _GivenStates) -> None:
        super().__init__()
        self.__dict__.update(real=real, given=given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> _GivenOutput:
        """Return the given hidden states, whatever the arguments are."""
        given: _GivenStates = self.__dict__["given"]
        given.taken = True
        return _GivenOutput(last_hidden_state=given.hidden_1nD)


@contextmanager
def _replaced(makers: list[nn.Module], model: nn.Module, given: _GivenStates) -> Iterator[None]:
    """Put stand-ins in the modules' places, wherever these are in a model."""
    changed: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if any(child is maker for maker in makers):
                changed.append((parent._modules, name, child))  # type: ignore[arg-type]
    try:
        for places, name, child in changed:
            places[name] = _StandIn(child, given)
        yield
    finally:
        for places, name, child in changed:
            places[name] = child


def _find_curve(model: PreTrainedModel, width: int) -> Curve | None:
    """Find the curve from a head's product to logits; ``None`` where there is none."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module) or head._forward_hooks or head._forward_pre_hooks:
        return None
    within = {id(p) for part in (*_hidden_state_modules(model), head) for p in part.parameters()}
    if any(id(parameter) not in within for parameter in model.parameters()):
        return None  # parameters of the tail itself may be trained
    generator = torch.Generator().manual_seed(0)
    hidden_nD = torch.randn(8, width, generator=generator).to(model.device)

    def try_at(factor: float) -> tuple[Tensor, Tensor]:
        scaled_nD = hidden_nD * factor
        logits_nV = _own_logits(model, scaled_nD)
        if logits_nV is None:
            raise ValueError("the model does not call its backbone")
        return _product(head, scaled_nD).cpu().double(), logits_nV.cpu().double()

    unit = 1 / max(_product(head, hidden_nD).std().item(), 1e-30)
    try:
        samples = [try_at(unit * spread) for spread in _TRIED_SPREADS]
        curves = (PLAIN, _fit_scale(*try_at(unit)), _fit_cap(try_at, unit))
    except Exception:  # a forward that wants more than tokens may raise any kind of error
        return PLAIN  # `verify_scores` finds out whether that is right
    return next((c for c in curves if all(_fits(c, *sample) for sample in samples)), None)


def _product(head: nn.Module, hidden_nD: Tensor) -> Tensor:
    # The frozen head computes this product, whatever else a call would do.
    if type(head) is nn.Linear:
        return F.linear(hidden_nD, head.weight, head.bias)
    product_nV: Tensor = head(hidden_nD)
    return product_nV


def _fit_scale(product_nV: Tensor, logits_nV: Tensor) -> Curve:
    """Compute the factor that fits best; 1 where it differs from that by rounding alone."""
    scale = ((logits_nV * product_nV).sum() / product_nV.square().sum()).item()
    return Curve(scale=1.0 if abs(scale - 1) < 1e-6 else scale)


def _fit_cap(try_at: Callable[[float], tuple[Tensor, Tensor]], unit: float) -> Curve:
    """Compute the cap from logits of large products, and the factor from logits of small ones."""
    cap = try_at(unit * 1e6)[1].abs().max().item()
    product_nV, logits_nV = try_at(unit)
    inner_nV = torch.atanh((logits_nV / cap).clamp(-0.999, 0.999)) * cap
    return Curve(scale=_fit_scale(product_nV, inner_nV).scale, cap=cap)


def _fits(curve: Curve, product_nV: Tensor, logits_nV: Tensor) -> bool:
    if product_nV.shape != logits_nV.shape:
        return False
    difference = (curve(product_nV) - logits_nV).abs().max()
    return bool(difference <= _TOLERANCE * logits_nV.std())
