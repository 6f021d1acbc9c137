"""Find a recipe: learning rate, β, rank and targets of each preference loss, under one budget.

    python benchmarks/sweep.py search --model DIR --data HH_DIR --study sweep.log --trials 12
    python benchmarks/sweep.py final --model DIR --data HH_DIR --study sweep.log --json sweep.json

``search`` gives each loss as many trials, each as many pairs. A tenth of the training pairs is held
out and judges them; a trial that falls behind the median of its loss is pruned. It goes on where a
search stopped when the same command is given again, since all trials lie in the study's file.
Several processes may search it at once, each some of the ``--losses``.

``final`` trains each loss's best trial again from several seeds, and measures the test pairs, which
no trial has seen: once for each of these runs. The study keeps what came out of each, so that they
are not measured again: given again, the command writes the same results, or goes on with more
seeds. No trial is added to a study after that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from recipes import (
    JUDGED,
    KINDS,
    RANKS,
    RATES,
    SCALES,
    TOLD,
    Budget,
    Recipe,
    add_run_flags,
    budget_of,
    content_of,
    quiet,
    run_recipe,
)
from rich import box
from rich.console import Console
from rich.table import Table
from sidebyside import machine, output
from sidebyside.options import resolve_device

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import check_output, write_atomically

_TESTED = "tested"
"""The study's note on what its best trial gave on the test pairs."""


def storage_of(path: Path) -> Any:
    """Open the file that holds the studies of all losses; makes it if it is not there."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def settings_of(options: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Return what a study may not change: what it runs, and how its trials are searched."""
    settings = {"budget": asdict(budget), "content": content_of(options)}
    if options.what == "search":
        settings |= {"rates": list(options.rates), "looks": options.looks}
    return settings


def refuse_other_study(options: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Refuse a file that is no study, or of another search, before anything is written to it.

    Raises:
        AlignkitError: It is one.
    """
    path = options.study
    if path.is_dir():
        raise AlignkitError(f"--study {path}: is a folder; name a file")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            first = None
    if not isinstance(first, dict) or "op_code" not in first:
        raise AlignkitError(f"--study {path}: is no study of a search; name another file")
    for study in storage_of(path).get_all_studies():
        for name, value in settings.items() if study.study_name in options.losses else ():
            settled = study.user_attrs.get(name)
            if settled not in (None, value):
                told = {"budget": "the budget", "rates": "the --rates", "looks": "--looks"}
                began = f"{told[name]} {settled}" if name in told else "another --model or --data"
                raise AlignkitError(f"--study {path}: was begun with {began}")


def study_of(options: argparse.Namespace, loss: str, settings: Mapping[str, Any]) -> Any:
    """Open the study of a loss in the file that holds all of them, and note its settings."""
    import optuna

    study = optuna.create_study(
        study_name=loss,
        storage=storage_of(options.study),
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    # Of another seed after every start: the first draws would be those of the start before.
    study.sampler = optuna.samplers.TPESampler(seed=options.seed + len(study.trials))
    for name, value in settings.items():
        study.set_user_attr(name, value)
    return study


def search(options: argparse.Namespace, budget: Budget, console: Console) -> int:
    """Run the trials that are missing; one that fails counts, and the next one is tried."""
    import optuna

    def objective(trial: Any, loss: str) -> float:
        low, high = SCALES[KINDS[loss]]
        recipe = Recipe(
            loss=loss,
            beta=trial.suggest_float("beta", low, high, log=True),
            lr=trial.suggest_float("lr", *options.rates, log=True),
            r=trial.suggest_categorical("r", RANKS),
            targets=trial.suggest_categorical("targets", ("attention", "all-linear")),
        )

        def look(step: int, value: float) -> None:
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        found = run(recipe, budget, options, seed=0, looks=options.looks, look=look)
        for name, value in found.items():
            trial.set_user_attr(name, value)
        return found[JUDGED]

    settings = settings_of(options, budget)
    for loss in options.losses:
        study = study_of(options, loss, settings)
        if _TESTED in study.user_attrs and len(study.trials) < options.trials:
            raise AlignkitError(
                f"--study {options.study}: the test pairs of {loss} have been measured with the "
                "best of its trials; search in another study"
            )
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            # Cut off with the search that ran it, as no other one has this loss.
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        for _ in range(max(0, options.trials - len(study.trials))):
            study.optimize(partial(objective, loss=loss), n_trials=1, catch=(AlignkitError,))
            last = study.trials[-1]
            console.print(
                f"{loss} {last.number}: {last.state.name.lower()} {last.values} {last.params}",
                highlight=False,
                soft_wrap=True,
            )
        if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            raise AlignkitError(f"{loss}: no trial finished; the lines above say why")
    return 0


def run(recipe: Recipe, budget: Budget, options: argparse.Namespace, **how: Any) -> dict[str, Any]:
    """Run a recipe; all runs of a study share what the reference gave."""
    references = f"{options.study}.references"
    return run_recipe(recipe, budget, options.model, options.data, references=references, **how)


def final(options: argparse.Namespace, budget: Budget, console: Console) -> int:
    """Measure the best recipe of each loss on the test pairs, over several seeds, once."""
    import optuna

    target = check_output(options.json, "--json")
    if target is None:
        raise AlignkitError("--json: name a file for the results")
    if not options.study.exists():
        raise AlignkitError(f"--study {options.study}: is not there; search first")
    found: dict[str, Any] = {}
    settings = settings_of(options, budget)
    for loss in options.losses:
        study = study_of(options, loss, settings)
        finished = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        if not finished:
            raise AlignkitError(f"--study {options.study}: holds no finished trial of {loss}")
        best = max(finished, key=lambda trial: trial.value)
        recipe = asdict(Recipe(loss=loss, **best.params))
        tested = {"recipe": recipe, "held_out": best.user_attrs, "runs": []}
        tested = study.user_attrs.get(_TESTED, tested)
        while len(tested["runs"]) < options.seeds:
            seed = 1 + len(tested["runs"])
            measured = run(Recipe(**tested["recipe"]), budget, options, seed=seed, test=True)
            tested = {**tested, "runs": [*tested["runs"], measured]}
            study.set_user_attr(_TESTED, tested)
        found[loss] = {**tested, "trials": len(finished), "test": summary(tested["runs"])}
    about = machine.describe(resolve_device("auto"))
    about |= {"model": options.model, "command": output.command()}
    result = {"budget": asdict(budget), "losses": found, "machine": about}
    write_atomically(target, json.dumps(result, indent=2) + "\n")
    console.print(table(found))
    return 0


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Return each metric's mean over runs, and its standard error (none for one run)."""
    return {
        name: {
            "mean": mean(run[name] for run in runs),
            "error": stdev(run[name] for run in runs) / len(runs) ** 0.5 if len(runs) > 1 else None,
        }
        for name in TOLD
    }


def table(found: Mapping[str, Any]) -> Table:
    """Return the results as a table of Markdown."""
    shown = Table(title="test pairs, mean over seeds ± standard error", box=box.MARKDOWN)
    for header in ("loss", "β", "lr", "r", "targets", "accuracy", "loss on pairs", "margin"):
        shown.add_column(header)
    for loss, each in found.items():
        recipe, test = each["recipe"], each["test"]
        numbers = [
            f"{test[name]['mean']:.3f}"
            + (f" ± {test[name]['error']:.3f}" if test[name]["error"] is not None else "")
            for name in (JUDGED, "loss", "rewards/margins")
        ]
        chosen = (f"{recipe['beta']:.3g}", f"{recipe['lr']:.2g}", str(recipe["r"]))
        shown.add_row(loss, *chosen, recipe["targets"], *numbers)
    return shown


def parse() -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_run_flags(flags)
    add = flags.add_argument
    add("what", choices=["search", "final"])
    add("--study", type=Path, required=True, help="the file that holds the trials")
    add("--losses", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--trials", type=int, default=12, help="of each loss, those of earlier searches counted")
    add("--rates", type=float, nargs=2, default=RATES, help="least and largest learning rate")
    add("--looks", type=int, default=4, help="validations of a trial, which may be pruned at each")
    add("--seed", type=int, default=0, help="of the choices")
    add("--json", help="a file for the results of final")
    return flags.parse_args()


def main() -> int:
    """Search or measure; returns 2 for a user's mistake."""
    quiet()
    options = parse()
    try:
        budget = check(options)
        return {"search": search, "final": final}[options.what](options, budget, Console())
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> Budget:
    """Refuse what would fail after the first run, or with a trace; returns the budget.

    Raises:
        AlignkitError: Optuna, a folder or a file is missing, a number is out of its range, or the
            study is another one.
    """
    if importlib.util.find_spec("optuna") is None:
        raise AlignkitError("optuna is not installed; run pip install 'alignkit[sweep]'")
    if not 0 < options.rates[0] < options.rates[1]:
        raise AlignkitError(
            f"--rates {' '.join(map(str, options.rates))}: give a least and a larger rate"
        )
    if not options.study.parent.is_dir():
        raise AlignkitError(f"--study {options.study}: its folder is missing")
    budget = budget_of(options)
    refuse_other_study(options, settings_of(options, budget))
    return budget


if __name__ == "__main__":
    sys.exit(main())
