"""Small batches and a plain training loop to hold the modules against."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from alignkit.engine import Example, PackedBatch, collate, score


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Random pairs of very different lengths."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, 384) for _ in range(draw.randint(low, high))]

    return [Example(ids(1, 20), [ids(1, 30), ids(1, 30)]) for _ in range(count)]


def answers(count: int, seed: int = 0) -> list[Example]:
    """Random prompts with one response."""
    return [Example(p.prompt, p.responses[:1]) for p in pairs(count, seed)]


def loader(examples: list[Example], batch_size: int) -> DataLoader[PackedBatch]:
    """Batches in order."""
    return DataLoader(examples, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def trainer(directory: Any, **options: Any) -> L.Trainer:
    """A quiet CPU trainer that logs every step."""
    defaults: dict[str, Any] = {
        "default_root_dir": directory,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{**defaults, **options})


def sgd(parameters: Any) -> torch.optim.SGD:
    """Plain SGD: a parameter's change is its gradient."""
    return torch.optim.SGD(parameters, lr=0.1)


def plain_cross_entropy_steps(
    model: PreTrainedModel, windows: list[list[Example]], lr: float = 0.1
) -> list[float]:
    """One SGD step a window on the mean over all its scored tokens; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for window in windows:
        loss = -score(model, collate(window)).mean()
        gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
        losses.append(loss.item())
    return losses


def logged_steps(module: L.LightningModule) -> dict[str, list[float]]:
    """Collect from here on what a module logs at its steps, by name, instead of logging it."""
    logged: dict[str, list[float]] = {}

    def log(name: str, value: Any, **_: Any) -> None:
        if isinstance(value, (int, float, Tensor)):
            logged.setdefault(name, []).append(float(value))

    module.log = log  # type: ignore[method-assign]
    return logged
