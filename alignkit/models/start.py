"""Start a stage from given weights: a checkpoint of any stage, or an adapter in PEFT's format.

Both say what adapter they hold, so that ``model.lora`` need not repeat it. Where ``model.lora`` is
given, it must agree: tensors of equal names and shapes under another scale are another model.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, load_adapter
from alignkit.lora.identity import Identity, difference, identity
from alignkit.lora.io import adapter_config
from alignkit.lora.peft_files import CONFIG_FILE, read_adapter
from alignkit.lora.resize import fit_embeddings, own_rows, resize_embeddings
from alignkit.models import checkpoint as ckpt
from alignkit.models.fingerprint import BaseIdentity
from alignkit.models.hub import adapter_on_hub
from alignkit.models.reward import attach_head, holds_reward
from alignkit.models.stamp import STAMP, check_adapter_base, check_base
from alignkit.models.text_format import TextFormat, format_in, read_format

Choice = LoRAConfig | Literal["auto"] | None
"""A value of ``model.lora``; ``auto`` takes the start's adapter, or `LoRAConfig`'s defaults."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Start(ABC):
    """Provide the weights to start from.

    Attributes:
        where: Names the weights in messages.
    """

    def __init__(self, place: str) -> None:
        self.where = f"init_from {place}"

    def lora(self, model: PreTrainedModel, base: BaseIdentity, choice: Choice) -> LoRAConfig | None:
        """Return the adapter to inject into a base, which `fill` then fills.

        Args:
            model: The base, without adapters yet.
            base: The base's identity.
            choice: The adapter that was asked for.

        Raises:
            AlignkitError: The weights belong to another base, or another adapter was asked for.
        """
        self.check_base(base)
        own = self.own(model)
        chosen = own if choice == "auto" else choice
        differs = difference(
            self.identity(model), None if chosen is None else identity(model, chosen)
        )
        if differs is None:
            return chosen
        if chosen is None:
            raise AlignkitError(
                f"{self.where}: is an adapter, and model.lora: null trains the whole model; export "
                "it --to merged and pass that as model.base"
            )
        raise AlignkitError(f"{self.where}: {differs}, or --model.lora auto to take what is there")

    def resize(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Give a base the rows of embeddings that the weights were trained with."""

    @abstractmethod
    def own(self, model: PreTrainedModel) -> LoRAConfig | None:
        """Return the config of the adapter that the weights are; ``None`` for a whole model."""

    @abstractmethod
    def identity(self, model: PreTrainedModel) -> Identity | None:
        """Return what the weights mean, see `alignkit.lora.identity`."""

    @abstractmethod
    def check_base(self, base: BaseIdentity) -> None:
        """Refuse another base than the weights were trained on, where that is recorded."""

    @abstractmethod
    def text_format(self) -> TextFormat | None:
        """Return the text format that the weights were trained with, where that is recorded."""

    @abstractmethod
    def fill(self, model: PreTrainedModel) -> None:
        """Load the weights into a model that has the adapter that `lora` returns."""


class CheckpointStart(Start):
    """Provide the weights of a ``.ckpt`` file of any stage."""

    def __init__(self, place: str, rewards: bool) -> None:
        super().__init__(place)
        self.checkpoint: Mapping[str, Any] = ckpt.read_checkpoint(place)
        if holds_reward(self.checkpoint) and not rewards:
            raise AlignkitError(
                f"{self.where}: is a reward model's checkpoint, with which RewardModule alone goes "
                "on; pass one of another stage"
            )

    def resize(self, model: PreTrainedModel) -> None:
        """Give it the rows that the checkpoint's hyper-parameters name."""
        resize_embeddings(model, ckpt.embedding_rows(self.checkpoint))

    def own(self, model: PreTrainedModel) -> LoRAConfig | None:
        """Return the config that the checkpoint's hyper-parameters hold."""
        settings = self.checkpoint["hyper_parameters"]["lora"]
        return None if settings is None else LoRAConfig.from_dict(settings)

    def identity(self, model: PreTrainedModel) -> Identity | None:
        """Return the adapter's identity from the checkpoint's stamp."""
        meant: Identity | None = self.checkpoint[STAMP]["adapter"]
        return meant

    def check_base(self, base: BaseIdentity) -> None:
        """Compare the base with the checkpoint's stamp."""
        check_base(base, self.checkpoint[STAMP], self.where)

    def text_format(self) -> TextFormat | None:
        """Return the text format that the checkpoint keeps."""
        return format_in(self.checkpoint, self.where)

    def fill(self, model: PreTrainedModel) -> None:
        """Load the policy's tensors, and a reward model's head."""
        if holds_reward(self.checkpoint):
            attach_head(model)
        ckpt.load_trainable(model, ckpt.model_state(self.checkpoint), self.where)


class AdapterStart(Start):
    """Provide an adapter in PEFT's directory format, or in the one file that ``export`` writes."""

    def __init__(self, place: str, path: Path) -> None:
        super().__init__(place)
        self.path = path

    def resize(self, model: PreTrainedModel) -> None:
        """Give it the rows that the adapter's file holds.

        Raises:
            AlignkitError: It holds rows of the base besides, which no checkpoint would keep.
        """
        tensors = read_adapter(self.path).tensors
        fit_embeddings(model, tensors)
        if own_rows(model, tensors):
            raise AlignkitError(
                f"{self.where}: adapts resized embeddings by low rank, and their new rows are in "
                "its file alone; export it --to merged and pass that as model.base"
            )

    def own(self, model: PreTrainedModel) -> LoRAConfig:
        """Return PEFT's settings as ours."""
        # An adapter on tied embeddings was trained with them untied.
        return adapter_config(model, self.path, untie=True)

    def identity(self, model: PreTrainedModel) -> Identity:
        """Return the adapter's identity, as PEFT's settings give it on the model."""
        return identity(model, self.own(model))

    def check_base(self, base: BaseIdentity) -> None:
        """Compare the base with the file's header, where alignkit wrote it."""
        check_adapter_base(base, self.path, self.where)

    def text_format(self) -> TextFormat | None:
        """Return the text format that lies beside the adapter, if any."""
        return read_format(self.path if self.path.is_dir() else self.path.parent)

    def fill(self, model: PreTrainedModel) -> None:
        """Load the adapter's tensors."""
        load_adapter(model, self.path, untie=True)


def find_start(place: str, rewards: bool = False) -> Start:
    """Return the start that a path or a Hub id stands for.

    Args:
        place: A ``.ckpt`` file, an adapter's directory or ``.safetensors`` file, or the Hub id of
            an adapter.
        rewards: Whether a reward model is to start, which may go on with another.

    Raises:
        AlignkitError: There is nothing there, it is damaged, or another kind of model.
    """
    path = Path(place)
    if ckpt.is_adapter(place):
        return AdapterStart(place, path)
    if path.is_dir():
        raise AlignkitError(
            f"init_from {place}: holds no {CONFIG_FILE}; pass a .ckpt file or an adapter's "
            "directory, and a whole model as model.base"
        )
    if not path.exists() and path.suffix != ".ckpt" and _HUB_ID.fullmatch(place):
        return AdapterStart(place, adapter_on_hub(place, "init_from"))
    return CheckpointStart(place, rewards)
