"""Data that is right: parsed, audited, encoded once, dealt by token budget, resumed exactly."""

from alignkit.data.base import AlignmentDataModule
from alignkit.data.hh_rlhf import HHPreferenceDataModule, HHSFTDataModule
from alignkit.data.openwebtext import OpenWebTextDataModule
from alignkit.data.policies import Policies
from alignkit.data.samplers import TokenBudgetBatchSampler
from alignkit.data.tokens import encode_prompt

__all__ = [
    "AlignmentDataModule",
    "HHPreferenceDataModule",
    "HHSFTDataModule",
    "OpenWebTextDataModule",
    "Policies",
    "TokenBudgetBatchSampler",
    "encode_prompt",
]
