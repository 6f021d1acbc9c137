"""Hold the models of a chat, adapters of one base in one copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import AlignkitError
from alignkit.lora import active_adapter, adapter_configs, set_adapter
from alignkit.models.checkpoint import add_policy, policy_base
from alignkit.models.find import find_checkpoint
from alignkit.models.text_format import TextFormat
from alignkit.tools.generate.request import Request

BASE = "base"
"""The name under which the base of the first model is asked without its adapter."""


@dataclass
class Seat:
    """Hold what one name in a chat stands for.

    Example:
        >>> Seat(model=None, tokenizer=None, asked=None, adapter=None).adapter is None
        True

    Attributes:
        model: The model, which seats of one base share.
        tokenizer: Its tokenizer.
        asked: The text format to ask it with.
        adapter: The adapter to make active; ``None`` for the model alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    asked: TextFormat
    adapter: str | None

    def take(self) -> None:
        """Make this seat's adapter the active one of its model."""
        if adapter_configs(self.model):
            set_adapter(self.model, self.adapter, trainable=False)


def load_seats(named: Mapping[str, str], request: Request) -> dict[str, Seat]:
    """Load the models of a chat.

    The adapters of one base share a copy of it, so that switching between them takes no time. The
    base itself has a seat too, under the name ``base`` unless a model is called so.

    Args:
        named: The models' paths by their names.
        request: How to load and ask them.

    Raises:
        AlignkitError: A model cannot be loaded.
    """
    seats: dict[str, Seat] = {}
    shared: dict[str, Seat] = {}  # the first seat on each base
    places = {name: find_checkpoint(path) for name, path in named.items()}
    for name, path in places.items():
        base = request.base or policy_base(path)
        first = shared.get(base)
        if first is not None and adapter_configs(first.model):
            adapter = f"chat{len(seats)}"
            if add_policy(first.model, path, adapter):
                first.model.to(request.target)  # type: ignore[arg-type]
                asked = request.format_for(path, first.tokenizer)
                seats[name] = Seat(first.model, first.tokenizer, asked, adapter)
                continue
        model, tokenizer = request.load(path)
        torch.nn.Module.requires_grad_(model, False)
        asked = request.format_for(path, tokenizer)
        seats[name] = Seat(model, tokenizer, asked, active_adapter(model))
        shared.setdefault(base, seats[name])
    first = next(iter(seats.values()))
    if BASE not in seats and adapter_configs(first.model):
        place = request.base or policy_base(next(iter(places.values())))
        asked = request.format_for(place, first.tokenizer)
        seats[BASE] = Seat(first.model, first.tokenizer, asked, None)
    return seats


def unknown_seat(name: str, seats: Mapping[str, Seat]) -> AlignkitError:
    """Return the error about a name that no model of the chat has."""
    return AlignkitError(f"/model {name}: there are {', '.join(seats)}")
