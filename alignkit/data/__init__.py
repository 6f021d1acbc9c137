"""Read data sets, check their rows, encode them once and deal them to ranks in batches."""

from alignkit.data.base import AlignmentDataModule
from alignkit.data.deal.samplers import TokenBudgetBatchSampler
from alignkit.data.dialogues import (
    HHPreferenceDataModule,
    HHSFTDataModule,
    PreferenceDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from alignkit.data.documents import OpenWebTextDataModule, TextDataModule
from alignkit.data.encode.tokens import encode_prompt
from alignkit.data.text.policies import Policies

__all__ = [
    "AlignmentDataModule",
    "HHPreferenceDataModule",
    "HHSFTDataModule",
    "OpenWebTextDataModule",
    "Policies",
    "PreferenceDataModule",
    "SFTDataModule",
    "TextDataModule",
    "TokenBudgetBatchSampler",
    "UnpairedDataModule",
    "encode_prompt",
]
