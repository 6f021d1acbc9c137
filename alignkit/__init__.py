"""Align causal language models in three stages: LoRA language modelling, SFT and DPO."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.data import (
        HHPreferenceDataModule,
        HHSFTDataModule,
        OpenWebTextDataModule,
        PreferenceDataModule,
        SFTDataModule,
        TextDataModule,
        UnpairedDataModule,
    )
    from alignkit.errors import AlignkitError
    from alignkit.modules import (
        AlignmentModule,
        DPOModule,
        KTOModule,
        LoRAModule,
        LossOutput,
        RewardModule,
        SFTModule,
    )
    from alignkit.tools.sample_answers import SampleAnswers

__version__ = "0.1.0"

__all__ = [
    "AlignkitError",
    "AlignmentModule",
    "DPOModule",
    "HHPreferenceDataModule",
    "HHSFTDataModule",
    "KTOModule",
    "LoRAModule",
    "LossOutput",
    "OpenWebTextDataModule",
    "PreferenceDataModule",
    "RewardModule",
    "SFTDataModule",
    "SFTModule",
    "SampleAnswers",
    "TextDataModule",
    "UnpairedDataModule",
]

_HOMES = {
    "AlignkitError": "alignkit.errors",
    "HHPreferenceDataModule": "alignkit.data",
    "HHSFTDataModule": "alignkit.data",
    "OpenWebTextDataModule": "alignkit.data",
    "PreferenceDataModule": "alignkit.data",
    "SFTDataModule": "alignkit.data",
    "SampleAnswers": "alignkit.tools.sample_answers",
    "TextDataModule": "alignkit.data",
    "UnpairedDataModule": "alignkit.data",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the engine and the adapters stand without Lightning.
    if name not in __all__:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "alignkit.modules")), name)
