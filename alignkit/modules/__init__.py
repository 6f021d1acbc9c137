"""Provide the training stages as LightningModules."""

from alignkit.modules.base import AlignmentModule
from alignkit.modules.dpo import DPOModule
from alignkit.modules.kto import KTOModule
from alignkit.modules.lora import LoRAModule
from alignkit.modules.reward import RewardModule
from alignkit.modules.sft import SFTModule
from alignkit.modules.window import LossOutput

__all__ = [
    "AlignmentModule",
    "DPOModule",
    "KTOModule",
    "LoRAModule",
    "LossOutput",
    "RewardModule",
    "SFTModule",
]
