"""Data that is right: parsed, audited, encoded once, dealt by token budget, resumed exactly."""

from alignkit.data.base import AlignmentDataModule
from alignkit.data.deal.samplers import TokenBudgetBatchSampler
from alignkit.data.encode.tokens import encode_prompt
from alignkit.data.hh_rlhf import HHPreferenceDataModule, HHSFTDataModule
from alignkit.data.openwebtext import OpenWebTextDataModule
from alignkit.data.text.policies import Policies

__all__ = [
    "AlignmentDataModule",
    "HHPreferenceDataModule",
    "HHSFTDataModule",
    "OpenWebTextDataModule",
    "Policies",
    "TokenBudgetBatchSampler",
    "encode_prompt",
]
