"""Log how much memory training takes, and how much of the device's arithmetic it uses."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from alignkit.lora.inject import base_parameter_count
from alignkit.utils.memory import peak_bytes

GIB = 2**30


class Usage(Callback):
    """Log ``train/peak_memory_gib`` and ``train/mfu`` at the steps that are logged.

    - The first is the most memory that rank 0 has had so far: allocated on its GPU, or resident on
      a host without one.
    - The second, model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), is
      the share of the device's peak that the blocks' products take: `flops_per_token` times the
      tokens a second, over all devices. Attention, the output head and what is computed twice are
      left out. It is logged where Lightning knows the peak of the device, which it does of most
      NVIDIA GPUs, and for models without experts.

    Every `AlignmentModule` adds this callback to its trainer.
    """

    _flops: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the device's peak and what a token costs."""
        self._flops = None
        per_token, peak = flops_per_token(pl_module), _peak_flops(trainer, pl_module.device)
        if per_token and peak:
            self._flops = per_token / (peak * trainer.world_size)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log both at a logged step."""
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if trainer.fit_loop._should_accumulate() or trainer.global_step % every:
            return
        found = {"peak_memory_gib": peak_bytes(pl_module.device) / GIB}
        speed = trainer.callback_metrics.get("train/tokens_per_second")
        if self._flops is not None and speed is not None:
            found["mfu"] = self._flops * float(speed)
        for name, value in found.items():
            pl_module.log(f"train/{name}", value, batch_size=1, rank_zero_only=True)


def flops_per_token(module: LightningModule) -> float | None:
    """Return the FLOPs of the blocks' products for a token; ``None`` for a mixture of experts.

    A forward pass takes two for each weight, a backward pass two for the activations' gradients and
    two for each weight that trains; a live reference is one more forward pass.

    Args:
        module: An `alignkit.AlignmentModule`.
    """
    model: Any = module.model
    text = model.config.get_text_config()
    if any("expert" in name and value for name, value in text.to_dict().items()):
        return None
    ends = {id(p): p.numel() for e in _ends(model) for p in e.parameters(recurse=True)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in ends)
    weights = base_parameter_count(model) - sum(ends.values())
    reference = getattr(module, "reference", None)
    live = reference is not None and reference.cache is None
    return float(4 * weights + 2 * min(trained, weights) + 2 * weights * live)


def _ends(model: Any) -> list[nn.Module]:
    """Return the embedding and the output head."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [each for each in found if each is not None]


def _peak_flops(trainer: Trainer, device: torch.device) -> float | None:
    """Return the products a second that a device is able to do at the run's precision."""
    precision = str(trainer.precision)
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    dtype = half if "16" in precision else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know the device
        return get_available_flops(device, dtype)
