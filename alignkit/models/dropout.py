"""Every dropout and jitter probability of a base model, whatever holds it, set to zero."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# attention_dropout, resid_pdrop, layerdrop, drop_path_rate, router_jitter_noise, moe_jitter_eps …
_NAMES = re.compile(r"drop|jitter")
# What a module calls its one probability where its class already says what for.
_PLAIN_NAMES = ("p", "prob", "rate", "probability")
_ATTRIBUTE = "alignkit_dropout"


@dataclass(frozen=True)
class Probability:
    """A probability as the model came with it.

    Attributes:
        holder: The module, config, namespace or dictionary that has it.
        name: Its attribute or key there.
        value: What it was; positive.
    """

    holder: Any
    name: str
    value: float

    def set(self, value: float) -> None:
        """Write a value in its place."""
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout, layer-drop and jitter probability of a model to zero.

    They are attributes of modules (``nn.Dropout.p``, OPT's ``layer.dropout``) or of the configs
    that modules read in their forward pass (GPT-J's ``config.attn_pdrop``), found by name. Whether
    that was all of them is for `alignkit.models.noise.refuse_noise` to show.

    Args:
        model: A base without adapters, whose own dropout is another matter. Changed in place; it
            remembers what the values were.
    """
    found = list(probabilities(model))
    for probability in found:
        probability.set(0.0)
    setattr(model, _ATTRIBUTE, [*zeroed(model), *found])


def zeroed(model: nn.Module) -> list[Probability]:
    """Return what `zero_dropout` found in a model."""
    found: list[Probability] = getattr(model, _ATTRIBUTE, [])
    return found


@contextmanager
def own_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model's own probabilities back while it is written: they belong to its config."""
    for probability in zeroed(model):
        probability.set(probability.value)
    try:
        yield
    finally:
        for probability in zeroed(model):
            probability.set(0.0)


def probabilities(model: nn.Module) -> Iterator[Probability]:
    """Yield every positive probability that a model's modules and configs hold, each once."""
    seen: set[int] = set()
    for module in model.modules():
        plain = "drop" in type(module).__name__.lower()
        for name, value in vars(module).items():
            if _is_probability(value) and (_NAMES.search(name) or (plain and name in _PLAIN_NAMES)):
                yield Probability(module, name, value)
            else:
                yield from _inside(value, seen)


def _inside(value: Any, seen: set[int]) -> Iterator[Probability]:
    """Yield those in a config, a plain record or a collection of them."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _inside(item, seen)
        return
    record = isinstance(value, (PreTrainedConfig, SimpleNamespace)) or (
        is_dataclass(value) and not isinstance(value, type)
    )
    if not (record or isinstance(value, dict)) or id(value) in seen:
        return
    seen.add(id(value))
    for name, item in (value if isinstance(value, dict) else vars(value)).items():
        if isinstance(name, str) and _NAMES.search(name) and _is_probability(item):
            yield Probability(value, name, item)
        else:
            yield from _inside(item, seen)


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and value > 0
