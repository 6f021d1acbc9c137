"""Read off a model's config the settings that decide what its weights compute."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

# Settings that do not count; every other one does. If an unknown setting were left out, two
# functions could count as one. If it counts without need, one function merely has two names.
_BOOKKEEPING = frozenset(
    {
        # How the model is found, loaded, stored and run.
        "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
        "quantization_config", "gradient_checkpointing", "chunk_size_feed_forward", "return_dict",
        "output_attentions", "output_hidden_states", "output_router_logits", "use_cache",
        # The weights show whether a head has a weight of its own, and adapters may untie it.
        "tie_word_embeddings",
        # How weights are drawn, and settings that only a training loss reads.
        "initializer_range", "initializer_factor", "init_std", "embed_init_std",
        "initializer_cutoff_factor", "router_aux_loss_coef", "router_z_loss_coef",
        "aux_loss_alpha", "seq_aux", "pretraining_tp",
        # Labels and special tokens, which concern the text.
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id",
        "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
        # Entries that other programs write into a config.json and no model reads.
        "is_llama_config", "rope_interleaved", "transformers.js_config", "unsloth_version",
        "unsloth_fixed",
    }
)  # fmt: skip
# Probabilities of training: attention_dropout, resid_pdrop, layerdrop, drop_path_rate,
# router_jitter_noise. ESM's token_dropout is excluded: it scales the embeddings in evaluation too.
_TRAINING_PROBABILITIES = re.compile(
    r"(?!token_dropout$).*(dropout|pdrop|layerdrop|drop_path)(_prob|_rate)?|.*jitter.*"
)
# Exceptions, which some models read in evaluation. PhiMoE compares scores with its jitter. Falcon
# computes attention differently, with other scores, where weights are asked for.
_READ_IN_EVALUATION = {("phimoe", "router_jitter_noise"), ("falcon", "output_attentions")}


def function_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config without its bookkeeping, the same whichever way the model was loaded.

    Defaults of the config's class are left out, so that a setting which a later transformers adds
    changes nothing. Numbers are rounded to six digits, since GGUF keeps them in float32.

    Args:
        config: The model's config.

    Returns:
        Plain values, sub-configs nested.
    """
    settings: dict[str, Any] = {"model_type": config.model_type}
    defaults = _class_defaults(type(config))
    for key, value in config.to_dict().items():
        nested = vars(config).get(key)
        if isinstance(nested, PreTrainedConfig):
            settings[key] = function_settings(nested)
        elif not _is_bookkeeping(config.model_type, key):
            plain = _plain_value(value)
            if plain != _plain_value(defaults.get(key)):
                settings[key] = plain
    return settings


def setting_defaults(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the defaults of the config's class, which `function_settings` leaves out."""
    return {key: _plain_value(value) for key, value in _class_defaults(type(config)).items()}


def settings_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any]
) -> str | None:
    """Return the first setting in which two bases differ, with both values.

    Example:
        >>> settings_difference({"rms_norm_eps": 1e-06}, {"rms_norm_eps": 1e-05}, {})
        'rms_norm_eps is 1e-06 there and 1e-05 here'

    Args:
        theirs: `function_settings` of the one base.
        ours: `function_settings` of the other.
        defaults: The values of settings that are left out.
    """
    for key in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(key), ours.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            inner = settings_difference(there, here, {})
            if inner is not None:
                return f"{key}.{inner}"
        elif there != here or (key in theirs) != (key in ours):
            a, b = (repr(side.get(key, defaults.get(key))) for side in (theirs, ours))
            return f"{key} is {a} there and {b} here"
    return None


def _is_bookkeeping(model_type: str, key: str) -> bool:
    if (model_type, key) in _READ_IN_EVALUATION:
        return False
    return (
        key in _BOOKKEEPING
        or key.startswith("_")
        or _TRAINING_PROBABILITIES.fullmatch(key) is not None
    )


def _class_defaults(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values a config's class gives to its fields."""
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _plain_value(value: Any) -> Any:
    """Return a value with the same JSON for equal settings, such as 10000 and 10000.0."""
    if isinstance(value, Mapping):
        plain = {str(key): _plain_value(inner) for key, inner in value.items()}
        return {key: inner for key, inner in plain.items() if inner is not None}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain_value(inner) for inner in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        return int(rounded) if rounded.is_integer() else rounded
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
