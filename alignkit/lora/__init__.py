"""Adapt transformers models by low rank (LoRA), with adapters that PEFT reads and writes."""

from alignkit.lora.combine import combine_adapters
from alignkit.lora.config import LoRAConfig
from alignkit.lora.inject import (
    active_adapter,
    adapter_configs,
    adapters_disabled,
    base_parameter_count,
    inject_lora,
    lora_parameter_groups,
    set_adapter,
    trainable_parameter_count,
)
from alignkit.lora.io import load_adapter, save_adapter, save_adapter_file
from alignkit.lora.layer import LoRAEmbedding, LoRALinear
from alignkit.lora.merge import MergeReport, is_merged, merge_lora, merge_report, unmerge_lora
from alignkit.lora.state import adapter_state_dict, load_adapter_state_dict

__all__ = [
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "active_adapter",
    "adapter_configs",
    "adapter_state_dict",
    "adapters_disabled",
    "base_parameter_count",
    "combine_adapters",
    "inject_lora",
    "is_merged",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_parameter_groups",
    "merge_lora",
    "merge_report",
    "save_adapter",
    "save_adapter_file",
    "set_adapter",
    "trainable_parameter_count",
    "unmerge_lora",
]
