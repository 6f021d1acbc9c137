"""Low-rank adaptation of transformers models, exchangeable with PEFT."""

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
from alignkit.lora.io import load_adapter, save_adapter
from alignkit.lora.layer import LoRAEmbedding, LoRALinear
from alignkit.lora.merge import merge_lora, unmerge_lora
from alignkit.lora.state import adapter_state_dict, load_adapter_state_dict

__all__ = [
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "active_adapter",
    "adapter_configs",
    "adapter_state_dict",
    "adapters_disabled",
    "base_parameter_count",
    "inject_lora",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_parameter_groups",
    "merge_lora",
    "save_adapter",
    "set_adapter",
    "trainable_parameter_count",
    "unmerge_lora",
]
