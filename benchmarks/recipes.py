"""One run of the sweep: a recipe, the budget that it is given, and what it comes to."""

from __future__ import annotations

import json
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import AdamW
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from alignkit import AlignmentModule, DPOModule, HHPreferenceDataModule
from alignkit.cli.logs import configure_logs
from alignkit.data import AlignmentDataModule
from alignkit.data.read.hashes import digest_of, file_hash
from alignkit.data.read.sources import find_splits
from alignkit.errors import AlignkitError
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
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
PRECISIONS += ("32", "bf16", "16", "64")  # which Lightning takes as well
JUDGED = "rewards/accuracies"
TOLD = ("loss", JUDGED, "rewards/margins")
HELD_OUT = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}


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
        max_length: Most tokens of a prompt with one answer; old turns go first.
        precision: Of the trainer.
    """

    pairs: int
    per_step: int
    tokens: int
    max_length: int
    precision: str

    @property
    def steps(self) -> int:
        """Return the optimizer steps."""
        return max(1, self.pairs // self.per_step)


def quiet() -> None:
    """Keep what libraries say of every run out of the way of the results."""
    configure_logs(quiet=True)
    disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|ExperimentalWarning).*"
    )


def add_run_flags(flags: ArgumentParser) -> None:
    """Add the options that say what every run trains, on what and for how long."""
    add = flags.add_argument
    add("--model", required=True, help="directory of the base, with its tokenizer")
    add("--data", required=True, help="a folder of pairs with train and test files")
    add("--seeds", type=int, default=3, help="runs of what is measured, each from a seed")
    add("--pairs", type=int, default=640, help="pairs that each run trains on")
    add("--per-step", type=int, default=16, help="pairs of an optimizer step")
    add("--tokens-per-batch", type=int, default=4096, help="most tokens of a packed row")
    add("--max-length", type=int, default=512, help="most tokens of a prompt with one answer")
    add("--precision", default="32-true", help=f"of the trainer: {', '.join(PRECISIONS)}")


def budget_of(options: Namespace) -> Budget:
    """Return the budget of a command line, once what every run needs is there.

    Raises:
        AlignkitError: A folder or a file is missing, or a number is out of its range.
    """
    if not (Path(options.model) / "config.json").is_file():
        raise AlignkitError(f"--model {options.model}: holds no config.json")
    if not Path(options.data).exists():
        raise AlignkitError(f"--data {options.data}: is not there")
    for name in ("trials", "seeds", "pairs", "per_step", "tokens_per_batch", "max_length", "looks"):
        if getattr(options, name, 1) < 1:
            raise AlignkitError(f"--{name.replace('_', '-')}: must be 1 or more")
    if options.precision not in PRECISIONS:
        raise AlignkitError(f"--precision {options.precision}: choose {', '.join(PRECISIONS)}")
    return Budget(
        options.pairs,
        options.per_step,
        options.tokens_per_batch,
        options.max_length,
        options.precision,
    )


def content_of(options: Namespace) -> dict[str, str]:
    """Return digests of the model's files and of the rows, which tell them from others."""
    kinds = (".json", ".jinja", ".model", ".safetensors", ".txt")
    files = sorted(path for path in Path(options.model).iterdir() if path.suffix in kinds)
    rows = {
        split: [source.digest for source in sources]
        for split, sources in find_splits(options.data).items()
    }
    told = {"model": {path.name: file_hash(path) for path in files}, "data": rows}
    return {name: digest_of(json.dumps(each).encode()) for name, each in told.items()}


def run_recipe(
    recipe: Recipe,
    budget: Budget,
    model: str,
    data: str,
    *,
    seed: int,
    references: str,
    looks: int = 1,
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
        references: Directory that keeps the reference's log-probs from one run to the next.
        looks: How often it is validated, at the end included.
        look: Is given the step and the held-out accuracy at each validation; may raise to stop.
        test: Measure the test pairs, and not those held out from training.
    """
    seed_everything(seed, verbose=False)
    loss = KINDS[recipe.loss](beta=recipe.beta)
    module = DPOModule(
        model,
        loss=loss,
        lora=adapter_of(model, recipe.r, recipe.targets),
        optimizer=partial(AdamW, lr=recipe.lr, weight_decay=0.0),
        warmup_steps=0.1,
        reference_cache=references if loss.uses_reference else None,
    )
    pairs = pairs_of(model, data, budget, seed)
    every = 0 if test else -(-budget.steps // looks)  # rounded up: as many looks, one at the end
    with trained(module, pairs, budget, every, Looks(look)) as trainer:
        found = trainer.callback_metrics
        if test:
            (found,) = trainer.test(module, pairs, verbose=False)
        elif budget.steps % every:
            (found,) = trainer.validate(module, pairs, verbose=False)
    stage = "test" if test else "val"
    return {name: float(found[f"{stage}/{name}"]) for name in TOLD}


def adapter_of(model: str, r: int, targets: str) -> LoRAConfig:
    """Return adapters on the attention's layers or on all linear ones."""
    family = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    attention = _ATTENTION.get(family, _APART)
    return LoRAConfig(
        r=r, alpha=2 * r, targets=attention if targets == "attention" else "all-linear"
    )


def pairs_of(model: str, data: str, budget: Budget, seed: int) -> HHPreferenceDataModule:
    """Return the pairs, of which a tenth of the training ones is held out."""
    return HHPreferenceDataModule(model, data, splits=HELD_OUT, seed=seed, **batches_of(budget))


def batches_of(budget: Budget) -> dict[str, Any]:
    """Return a data module's settings of batches."""
    return {
        "examples_per_batch": budget.per_step,
        "tokens_per_batch": budget.tokens,
        "max_length": budget.max_length,
    }


@contextmanager
def trained(
    module: AlignmentModule,
    data: AlignmentDataModule,
    budget: Budget,
    every: int,
    *callbacks: Callback,
) -> Iterator[Trainer]:
    """Train under a budget, and give the trainer; its files go when the block ends.

    Args:
        module: What to train.
        data: On what.
        budget: For how long.
        every: Steps between validations; 0 for none.
        *callbacks: Of the trainer.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-sweep-") as scratch:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=budget.precision,  # type: ignore[arg-type]
            max_steps=budget.steps,
            val_check_interval=every or None,
            check_val_every_n_epoch=None,
            limit_val_batches=None if every else 0,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
        trainer.fit(module, data)
        yield trainer


class Looks(Callback):
    """Tell of each validation while training."""

    def __init__(self, look: Callable[[int, float], None]) -> None:
        self._look = look

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer.global_step, float(trainer.callback_metrics[f"val/{JUDGED}"]))
