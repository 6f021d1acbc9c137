"""Read a written model back with plain transformers, and compare what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size
from alignkit.utils.bars import without_bars

_CausalLM: Any = AutoModelForCausalLM
PROMPTS, LENGTH, NEW = 4, 8, 16
# Rounding may change the choice between tokens that are as likely as one another.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def refuse_other_answers(model: PreTrainedModel, directory: Path, gguf: str | None = None) -> None:
    """Refuse a written model whose greedy answers are not those of the model in memory.

    transformers reads it without alignkit and continues a few prompts greedily. At every token the
    model in memory must find the choice the likeliest as well, or as likely within rounding.

    Args:
        model: The model that was written, without wrappers.
        directory: Where it lies.
        gguf: The file's name, if it is a GGUF file.

    Raises:
        AlignkitError: Their answers differ.
    """
    with without_bars():
        options: dict[str, Any] = (
            {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
            if gguf
            else {"use_safetensors": True}
        )
        other = _CausalLM.from_pretrained(
            directory, dtype=model.dtype, trust_remote_code=False, **options
        ).eval()
    sequences = torch.arange(PROMPTS * LENGTH).view(PROMPTS, LENGTH) * 37 % embedding_size(model)
    for _ in range(NEW):  # generate would stop, or pad, at an end token
        likeliest = other(sequences, use_cache=False).logits[:, -1:].argmax(-1)
        sequences = torch.cat((sequences, likeliest), dim=1)
    logits = model(sequences, use_cache=False).logits[:, LENGTH - 1 : -1].float()
    said = sequences[:, LENGTH:]
    behind = logits.amax(-1) - logits.gather(-1, said[..., None])[..., 0]
    worst, scale = behind.max().item(), logits.abs().max().item()
    if worst > _TOLERANCES[model.dtype] * max(scale, 1.0):
        raise AlignkitError(
            f"export: {gguf or directory.name}, read back by transformers, answers otherwise than "
            f"the model that was trained (a choice {worst:.2g} logits behind); report this model"
        )
