"""Find a recipe: learning rate, β, rank and targets of each preference loss, under one budget.

    python benchmarks/sweep.py search --model DIR --data HH_DIR --study sweep.log --trials 12
    python benchmarks/sweep.py final --model DIR --data HH_DIR --study sweep.log --json sweep.json

``search`` gives each loss as many trials, each as many pairs. A tenth of the training pairs is held
out and judges them; a trial that falls behind the median of its loss is pruned. It goes on where a
search stopped when the same command is given again, since all trials lie in the study's file.

``final`` trains each loss's best trial again from several seeds, and measures the test pairs, which
no trial has seen: once for each of these runs. It refuses to do so twice for one study.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sidebyside import machine, output
from torch.optim import AdamW
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from alignkit import DPOModule, HHPreferenceDataModule
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
from alignkit.utils.atomic import check_output, write_atomically

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
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in SCALES}
_RATES = (1e-5, 2e-3)
_RANKS = (2, 8, 32)
_ATTENTION = {
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
}
_APART = ["q_proj", "k_proj", "v_proj", "o_proj"]
_JUDGED = "rewards/accuracies"
_TOLD = ("loss", _JUDGED, "rewards/margins")
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
            loss=_KINDS[recipe.loss](beta=recipe.beta),
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
    return {name: float(found[f"{stage}/{name}"]) for name in _TOLD}


class Looks(Callback):
    """Tell of each validation while training."""

    def __init__(self, look: Callable[[int, float], None]) -> None:
        self._look = look

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer.global_step, float(trainer.callback_metrics[f"val/{_JUDGED}"]))


def study_of(place: Path, loss: str, seed: int) -> Any:
    """Open the study of a loss in the file that holds all of them, and end what was cut off."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=loss,
        storage=JournalStorage(JournalFileBackend(str(place))),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def search(options: argparse.Namespace, budget: Budget, console: Console) -> int:
    """Run the trials that are missing."""
    import optuna

    def objective(trial: Any, loss: str) -> float:
        low, high = SCALES[_KINDS[loss]]
        recipe = Recipe(
            loss=loss,
            beta=trial.suggest_float("beta", low, high, log=True),
            lr=trial.suggest_float("lr", *_RATES, log=True),
            r=trial.suggest_categorical("r", _RANKS),
            targets=trial.suggest_categorical("targets", ("attention", "all-linear")),
        )

        def look(step: int, value: float) -> None:
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        found = run_recipe(recipe, budget, options.model, options.data, seed=0, look=look)
        for name, value in found.items():
            trial.set_user_attr(name, value)
        return found[_JUDGED]

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    for loss in options.losses:
        study = study_of(options.study, loss, options.seed)
        settled = study.user_attrs.get("budget")
        if settled not in (None, asdict(budget)):
            raise AlignkitError(f"--study {options.study}: was begun with the budget {settled}")
        study.set_user_attr("budget", asdict(budget))
        left = options.trials - len(study.get_trials(deepcopy=False, states=states))
        for _ in range(max(0, left)):
            study.optimize(partial(objective, loss=loss), n_trials=1)
            last = study.trials[-1]
            console.print(
                f"{loss} {last.number}: {last.state.name.lower()} {last.values} {last.params}",
                highlight=False,
                soft_wrap=True,
            )
    return 0


def final(options: argparse.Namespace, budget: Budget, console: Console) -> int:
    """Measure the best recipe of each loss on the test pairs, over several seeds."""
    target = check_output(options.json, "--json")
    if target is None:
        raise AlignkitError("--json: name a file for the results")
    if target.exists():
        raise AlignkitError(f"--json {target}: the test pairs were measured; they are touched once")
    found: dict[str, Any] = {}
    for loss in options.losses:
        study = study_of(options.study, loss, options.seed)
        done = [trial for trial in study.trials if trial.values]
        if not done:
            raise AlignkitError(f"--study {options.study}: holds no finished trial of {loss}")
        best = study.best_trial
        recipe = Recipe(loss=loss, **best.params)
        runs = [
            run_recipe(recipe, budget, options.model, options.data, seed=1 + seed, test=True)
            for seed in range(options.seeds)
        ]
        found[loss] = {
            "recipe": asdict(recipe),
            "held_out": best.user_attrs,
            "trials": len(study.trials),
            "test": summary(runs),
            "runs": runs,
        }
    about = machine.describe("cpu") | {"model": options.model, "command": output.command()}
    result = {"budget": asdict(budget), "losses": found, "machine": about}
    write_atomically(target, json.dumps(result, indent=2) + "\n")
    console.print(table(found))
    return 0


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return each metric's mean over runs, and its standard error (NaN for one run)."""
    return {
        name: {
            "mean": mean(run[name] for run in runs),
            "error": stdev(run[name] for run in runs) / len(runs) ** 0.5
            if len(runs) > 1
            else float("nan"),
        }
        for name in _TOLD
    }


def table(found: Mapping[str, Any]) -> Table:
    """Return the results for a person."""
    shown = Table(title="test pairs, mean over seeds ± standard error")
    for header in ("loss", "β", "lr", "r", "targets", "accuracy", "loss on pairs", "margin"):
        shown.add_column(header)
    for loss, each in found.items():
        recipe, test = each["recipe"], each["test"]
        numbers = [
            f"{test[name]['mean']:.3f} ± {test[name]['error']:.3f}"
            for name in (_JUDGED, "loss", "rewards/margins")
        ]
        chosen = (f"{recipe['beta']:.3g}", f"{recipe['lr']:.2g}", str(recipe["r"]))
        shown.add_row(loss, *chosen, recipe["targets"], *numbers)
    return shown


def parse() -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = flags.add_argument
    add("what", choices=["search", "final"])
    add("--model", required=True, help="directory of the base, with its tokenizer")
    add("--data", required=True, help="a folder of pairs with train and test files")
    add("--study", type=Path, required=True, help="the file that holds the trials")
    add("--losses", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    add("--trials", type=int, default=12, help="of each loss, those of earlier searches counted")
    add("--seeds", type=int, default=3, help="runs of each loss on the test pairs")
    add("--pairs", type=int, default=640, help="pairs that each trial trains on")
    add("--per-step", type=int, default=16, help="pairs of an optimizer step")
    add("--tokens-per-batch", type=int, default=4096, help="most tokens of a packed row")
    add("--precision", default="32-true", help="of the trainer")
    add("--seed", type=int, default=0, help="of the choices")
    add("--json", help="a file for the results of final")
    return flags.parse_args()


def main() -> int:
    """Search or measure; returns 2 for a user's mistake."""
    disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|ExperimentalWarning).*"
    )
    options = parse()
    budget = Budget(options.pairs, options.per_step, options.tokens_per_batch, options.precision)
    try:
        return {"search": search, "final": final}[options.what](options, budget, Console())
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; pip install 'alignkit[sweep]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
