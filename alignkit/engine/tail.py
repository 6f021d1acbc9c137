"""What a model does to its hidden states to make logits: read off as a curve, or run as it is.

Many heads are one product and a scalar function of it: Cohere scales logits, Gemma 2 caps them.
Such a curve is found by trying it on random states, and logits are then made from the head alone.
Anything else is the model's own code, run on the scored positions.

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
_OWN = "own"
"""In place of a curve: the model's own code makes its logits."""
_SPREADS = (0.1, 3.0, 30.0)
"""Standard deviations, in nats, of the products on which a curve must hold."""
_EXACT = 1e-5
"""Largest difference of logits, as a part of their spread."""


def head_scores(
    model: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, stats: bool = False
) -> TokenScores:
    """Score tokens with the logits that a model makes of hidden states; no [T, V] tensor exists.

    Args:
        model: Its tail is tried at the first call.
        hidden_ND: [N, D], what its backbone returned for the positions that predict the tokens.
        target_N: [N] int64 token ids.
        stats: As in `token_scores`.
    """
    curve: Curve | str | None = getattr(model, _CURVE, None)
    if curve is None:
        with torch.inference_mode(False), torch.no_grad(), in_fp32(model, hidden_ND.device):
            curve = _find_curve(model, hidden_ND.shape[-1]) or _OWN
        setattr(model, _CURVE, curve)
    if isinstance(curve, str):
        return token_scores(_OwnTail(model), hidden_ND, target_N, stats)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return token_scores(head, hidden_ND, target_N, stats, curve)


class _OwnTail(nn.Module):
    """A model's forward on hidden states in place of tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.__dict__["model"] = model  # no submodule, whose parameters these would be

    def forward(self, hidden_nD: Tensor) -> Tensor:
        """Make [n, V] logits."""
        logits_nV = _own_logits(self.__dict__["model"], hidden_nD)
        if logits_nV is None:
            raise ValueError("it makes its logits without the part that makes hidden states")
        return logits_nV


def _own_logits(model: PreTrainedModel, hidden_nD: Tensor) -> Tensor | None:
    """[n, V] logits of a model's forward; ``None`` where it does not ask for hidden states."""
    given = _Given(hidden_nD)
    # Ids of the right number, for what looks at their shape.
    ids = torch.zeros(1, len(hidden_nD), dtype=torch.int64, device=hidden_nD.device)
    with _left_out(_makers_of_hidden_states(model), model, given):
        output = model(input_ids=ids, use_cache=False)
    logits_nV: Tensor = output.logits[0]
    return logits_nV if given.taken else None


def _makers_of_hidden_states(model: PreTrainedModel) -> list[nn.Module]:
    """The backbone, and the decoder inside it that some heads call past what wraps it."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    makers = [backbone(model)]
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        makers.append(decoder)
    return makers


class _Given:
    """Hidden states that are given instead of made, and whether they were taken."""

    def __init__(self, hidden_nD: Tensor) -> None:
        self.hidden_1nD = hidden_nD[None]
        self.taken = False


@dataclass
class _Output(BaseModelOutputWithPast):
    """Hidden states alone; whatever else a head passes on is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _StandIn(nn.Module):
    """Returns what is given; its attributes are those of the module that it stands in for."""

    def __init__(self, real: nn.Module, given: _Given) -> None:
        super().__init__()
        self.__dict__.update(real=real, given=given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        """Make nothing."""
        given: _Given = self.__dict__["given"]
        given.taken = True
        return _Output(last_hidden_state=given.hidden_1nD)


@contextmanager
def _left_out(makers: list[nn.Module], model: nn.Module, given: _Given) -> Iterator[None]:
    """Let stand-ins take the modules' places, wherever they hang in a model."""
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
    """Find the function from a head's product to logits; ``None`` where there is no such curve."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module) or head._forward_hooks or head._forward_pre_hooks:
        return None
    within = {id(p) for part in (*_makers_of_hidden_states(model), head) for p in part.parameters()}
    if any(id(parameter) not in within for parameter in model.parameters()):
        return None  # parameters of the tail itself may be trained
    generator = torch.Generator().manual_seed(0)
    hidden_nD = torch.randn(8, width, generator=generator).to(model.device)

    def tried(factor: float) -> tuple[Tensor, Tensor]:
        scaled_nD = hidden_nD * factor
        logits_nV = _own_logits(model, scaled_nD)
        if logits_nV is None:
            raise ValueError("the model does not call its backbone")
        return _product(head, scaled_nD).double(), logits_nV.double()

    unit = 1 / max(_product(head, hidden_nD).std().item(), 1e-30)
    try:
        samples = [tried(unit * spread) for spread in _SPREADS]
        curves = (PLAIN, _scaled(*tried(unit)), _capped(tried, unit))
    except Exception:  # whatever a forward raises that wants more than tokens
        return PLAIN  # as the proof finds, or not
    return next((c for c in curves if all(_holds(c, *sample) for sample in samples)), None)


def _product(head: nn.Module, hidden_nD: Tensor) -> Tensor:
    # What the frozen head computes, whatever else a call would do.
    if type(head) is nn.Linear:
        return F.linear(hidden_nD, head.weight, head.bias)
    product_nV: Tensor = head(hidden_nD)
    return product_nV


def _scaled(product_nV: Tensor, logits_nV: Tensor) -> Curve:
    """The factor that fits best; 1 where rounding alone tells it from that."""
    scale = ((logits_nV * product_nV).sum() / product_nV.square().sum()).item()
    return Curve(scale=1.0 if abs(scale - 1) < 1e-6 else scale)


def _capped(tried: Callable[[float], tuple[Tensor, Tensor]], unit: float) -> Curve:
    """The cap is where large products end; the factor shows below half of it."""
    cap = tried(unit * 1e6)[1].abs().max().item()
    product_nV, logits_nV = tried(unit)
    inner_nV = torch.atanh((logits_nV / cap).clamp(-0.999, 0.999)) * cap
    return Curve(scale=_scaled(product_nV, inner_nV).scale, cap=cap)


def _holds(curve: Curve, product_nV: Tensor, logits_nV: Tensor) -> bool:
    if product_nV.shape != logits_nV.shape:
        return False
    difference = (curve(product_nV) - logits_nV).abs().max()
    return bool(difference <= _EXACT * logits_nV.std())
