"""Set every dropout and jitter probability of a base model to zero, wherever it is kept."""

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
_PROBABILITY_NAMES = re.compile(r"drop|jitter")
# Names of the one probability of a module whose class has "drop" in its name.
_NAMES_IN_DROPOUT_CLASSES = ("p", "prob", "rate", "probability")
_ZEROED_ATTRIBUTE = "alignkit_dropout"


@dataclass(frozen=True)
class Probability:
    """Hold one probability of a model, with its original value.

    Example:
        >>> layer = nn.Dropout(0.25)
        >>> (probability,) = probabilities(layer)
        >>> probability.name, probability.value
        ('p', 0.25)
        >>> probability.set(0.0)
        >>> layer
        Dropout(p=0.0, inplace=False)

    Attributes:
        holder: The module, config, namespace or dictionary that keeps it.
        name: Its attribute or key there.
        value: Its original value; positive.
    """

    holder: Any
    name: str
    value: float

    def set(self, value: float) -> None:
        """Set it to a value in its holder."""
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout, layer-drop and jitter probability of a model to zero.

    They are attributes of modules (``nn.Dropout.p``, OPT's ``layer.dropout``) or of the configs
    that modules read in their forward pass (GPT-J's ``config.attn_pdrop``). They are found by name.
    `alignkit.models.noise.refuse_noise` checks that none was missed.

    Args:
        model: A base without adapters, so that the adapters' dropout is not touched. It is changed
            in place, and keeps the original values.
    """
    found = list(probabilities(model))
    for probability in found:
        probability.set(0.0)
    setattr(model, _ZEROED_ATTRIBUTE, [*zeroed(model), *found])


def zeroed(model: nn.Module) -> list[Probability]:
    """Return the probabilities that `zero_dropout` found in a model."""
    found: list[Probability] = getattr(model, _ZEROED_ATTRIBUTE, [])
    return found


@contextmanager
def own_dropout(model: nn.Module) -> Iterator[None]:
    """Restore a model's own probabilities while it is saved, since its config holds them."""
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
            if _is_probability(value) and (
                _PROBABILITY_NAMES.search(name) or (plain and name in _NAMES_IN_DROPOUT_CLASSES)
            ):
                yield Probability(module, name, value)
            else:
                yield from _probabilities_in(value, seen)


def _probabilities_in(value: Any, seen: set[int]) -> Iterator[Probability]:
    """Yield the probabilities in a config, a plain record or a collection of them."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _probabilities_in(item, seen)
        return
    record = isinstance(value, (PreTrainedConfig, SimpleNamespace)) or (
        is_dataclass(value) and not isinstance(value, type)
    )
    if not (record or isinstance(value, dict)) or id(value) in seen:
        return
    seen.add(id(value))
    for name, item in (value if isinstance(value, dict) else vars(value)).items():
        if isinstance(name, str) and _PROBABILITY_NAMES.search(name) and _is_probability(item):
            yield Probability(value, name, item)
        else:
            yield from _probabilities_in(item, seen)


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and value > 0
