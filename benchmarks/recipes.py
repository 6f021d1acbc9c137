"""One run of the sweep: a recipe, the budget that it is given, and what it comes to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import AdamW
from transformers import AutoConfig

from alignkit import DPOModule, HHPreferenceDataModule
from alignkit.lora import LoRAConfig
from alignkit.objectives.pairs import PreferenceLoss
from alignkit.objectives.preference import (
    DPO,
    EXO,
    IPO,
    ORPO,
    Hinge,
    NormalizedDPO,
    RobustDPO,
    SimPO,
)

# Of each loss: the range of its scale, drawn evenly in its logarithm.
SCALES: dict[type[PreferenceLoss], tuple[float, float]] = {
    DPO: (0.02, 1.0),
    RobustDPO: (0.02, 1.0),
    NormalizedDPO: (0.5, 20.0),
    EXO: (0.02, 1.0),
    Hinge: (0.02, 1.0),
    IPO: (0.01, 1.0),
    SimPO: (0.5, 10.0),
    ORPO: (0.02, 1.0),
}
KINDS: dict[str, Any] = {kind.__name__: kind for kind in SCALES}
RATES = (1e-5, 2e-3)
RANKS = (2, 8, 32)
_ATTENTION = {
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
}
_APART = ["q_proj", "k_proj", "v_proj", "o_proj"]
JUDGED = "rewards/accuracies"
TOLD = ("loss", JUDGED, "rewards/margins")
_LOOKS = 4
"""How often a trial is validated, and may be pruned."""
_HELD_OUT = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}


@dataclass(frozen=True)
class Recipe:
    """What a trial chooses.

    Attributes:
        loss: Name of the loss.
        beta: Its scale.
        lr: Learning rate of the adapters.
        r: Their rank; alpha is twice as much.
        targets: ``attention`` or ``all-linear``.
    """

    loss: str
    beta: float
    lr: float
    r: int
    targets: str


@dataclass(frozen=True)
class Budget:
    """What every trial gets.

    Attributes:
        pairs: Pairs that it trains on, passes over the data counted.
        per_step: Pairs of an optimizer step.
        tokens: Most tokens of a packed row.
        precision: Of the trainer.
    """

    pairs: int
    per_step: int
    tokens: int
    precision: str

    @property
    def steps(self) -> int:
        """Return the optimizer steps."""
        return max(1, self.pairs // self.per_step)


def run_recipe(
    recipe: Recipe,
    budget: Budget,
    model: str,
    data: str,
    *,
    seed: int,
    look: Callable[[int, float], None] = lambda step, value: None,
    test: bool = False,
) -> dict[str, float]:
    """Train once and return the held-out metrics.

    Args:
        recipe: What is tried.
        budget: For how long.
        model: Directory of the base.
        data: Pairs with a test split.
        seed: Of the order and the adapters.
        look: Is given the step and the held-out accuracy at each validation; may raise to stop.
        test: Measure the test pairs, instead of those held out from training.
    """
    seed_everything(seed, verbose=False)
    family = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    attention = _ATTENTION.get(family, _APART)
    every = max(1, budget.steps // _LOOKS)
    with tempfile.TemporaryDirectory(prefix="alignkit-sweep-") as scratch:
        module = DPOModule(
            model,
            loss=KINDS[recipe.loss](beta=recipe.beta),
            lora=LoRAConfig(
                r=recipe.r,
                alpha=2 * recipe.r,
                targets=attention if recipe.targets == "attention" else "all-linear",
            ),
            optimizer=partial(AdamW, lr=recipe.lr, weight_decay=0.0),
            warmup_steps=0.1,
        )
        pairs = HHPreferenceDataModule(
            model,
            data,
            splits=_HELD_OUT,
            examples_per_batch=budget.per_step,
            tokens_per_batch=budget.tokens,
            seed=seed,
        )
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=budget.precision,  # type: ignore[arg-type]
            max_steps=budget.steps,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[Looks(look)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
        trainer.fit(module, pairs)
        stage = "test" if test else "val"
        (found,) = (trainer.test if test else trainer.validate)(module, pairs, verbose=False)
    return {name: float(found[f"{stage}/{name}"]) for name in TOLD}


class Looks(Callback):
    """Tell of each validation while training."""

    def __init__(self, look: Callable[[int, float], None]) -> None:
        self._look = look

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer.global_step, float(trainer.callback_metrics[f"val/{JUDGED}"]))
