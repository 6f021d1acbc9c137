"""What all arms of a run share: model, tokenizer, adapter and token ids, as files."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from alignkit.engine import Example
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, save_adapter
from alignkit.models import load_model, load_tokenizer
from sidebyside.options import Common
from sidebyside.shapes import SHAPES, targets_of, write_random_model

# Of the adapter's factors. Together they change the weights by about a tenth: enough that a
# dropped, transposed or unscaled adapter is far outside of the parity gate.
_STD_A, _STD_B = 0.05, 0.02
_PERTURBATION = 0.2


@dataclass(frozen=True)
class Shared:
    """Where the shared things lie.

    Attributes:
        model: Directory.
        tokenizer: Directory, or what the user named.
        config: The model's.
        lora: What is adapted.
        adapter: PEFT directory with non-zero A and B.
    """

    model: str
    tokenizer: str
    config: PretrainedConfig
    lora: LoRAConfig
    adapter: str


def prepare(options: Common, work: Path) -> Shared:
    """Make or find the model and write its adapter.

    Raises:
        AlignkitError: The model cannot be found or read, or is of an unknown family.
    """
    if options.data is not None and options.model in SHAPES and options.tokenizer is None:
        raise AlignkitError(f"--data: {options.model} brings no tokenizer; pass --tokenizer DIR")
    model = _model_directory(options, work)
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    lora = LoRAConfig(r=8, alpha=16, targets=targets_of(config))
    adapter = work / "adapter"
    write_adapter(config, lora, adapter, options.seed)
    return Shared(model, options.tokenizer or model, config, lora, str(adapter))


def write_adapter(
    config: PretrainedConfig,
    lora: LoRAConfig,
    directory: Path,
    seed: int,
    noise: float = 0.0,
    std_b: float = _STD_B,
) -> None:
    """Write an adapter whose A and B are both non-zero.

    Args:
        config: The base model's; its weights are not needed.
        lora: What to adapt.
        directory: Where to.
        seed: Of the draw.
        noise: Standard deviation of what is added to B.
        std_b: Of B itself; 0 for an adapter that has learnt nothing yet.
    """
    model = inject_lora(empty_model(config), lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            parent, _, key = name.rpartition(".")
            values = torch.randn(parameter.shape, generator=generator)
            if key == "lora_B":
                extra = torch.randn(parameter.shape, generator=generator)
                values = values * std_b + extra * noise
            else:
                values = values * _STD_A
            setattr(model.get_submodule(parent), key, torch.nn.Parameter(values))
    save_adapter(model, directory, base="")


def perturbed_adapter(shared: Shared, work: Path, seed: int) -> str:
    """The shared adapter with noise in B, for the arm that parity must refuse."""
    directory = work / "perturbed"
    write_adapter(shared.config, shared.lora, directory, seed, _PERTURBATION)
    return str(directory)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without storage: its layers and shapes alone."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def write_examples(examples: Sequence[Example], path: Path) -> str:
    """Write examples as JSON: a list of [prompt ids, [response ids, …]]."""
    path.write_text(json.dumps([[e.prompt, e.responses] for e in examples]))
    return str(path)


def _model_directory(options: Common, work: Path) -> str:
    directory = work / "model"
    name = options.model
    if name in SHAPES:
        write_random_model(name, directory, options.seed, options.device)
        gc.collect()
        return str(directory)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        load_model(name, dtype=torch.bfloat16).save_pretrained(directory)
        load_tokenizer(name).save_pretrained(directory)
        return str(directory)
    if path.is_dir():
        return str(path)
    if name.endswith("-shape") or path.is_absolute():
        raise AlignkitError(f"--model {name}: no such directory or shape; use {', '.join(SHAPES)}")
    try:
        return str(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise AlignkitError(
            f"--model {name}: no such directory, and the Hub gave no such model "
            f"({str(error).splitlines()[0]})"
        ) from error
