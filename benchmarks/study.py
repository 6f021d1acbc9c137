"""Does the order of the stages matter, and the rank of the adapters? Every arm from several seeds.

    python benchmarks/study.py --model DIR --data HH_DIR --out study --seeds 3

Each arm trains on as many pairs and is measured on a tenth of the training pairs, which no arm
trains on. What it is compared with is always the base, wherever its own training began, so that all
arms answer one question: does the policy prefer the chosen answer more than the base does?

* `dpo`, `sft`, `sft-dpo`, `dpo-nll`: DPO from the base, SFT alone, DPO from SFT, and DPO with SFT's
  loss as a second term. `sft-dpo` trains twice, each time on as many pairs;
* `rank-1` to `rank-64`: DPO from the base with adapters of that rank on all linear layers;
* `full`: DPO of all parameters, in fp32.

``OUT/study.jsonl`` gets a line as each run ends, and given again the command runs what is missing.
``OUT/study.png`` draws the arms with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from recipes import (
    HELD_OUT,
    Budget,
    adapter_of,
    add_run_flags,
    batches_of,
    budget_of,
    content_of,
    pairs_of,
    quiet,
    trained,
)
from rich import box
from rich.console import Console
from rich.table import Table
from sidebyside import machine, output
from sidebyside.options import resolve_device
from torch.optim import AdamW

from alignkit import DPOModule, HHSFTDataModule, SFTModule
from alignkit.errors import AlignkitError
from alignkit.objectives.pairs import PreferenceLoss
from alignkit.objectives.preference import DPO, ChosenNLL, WeightedSum
from alignkit.tools.plots import COLORS, new_figure, save
from alignkit.utils.atomic import write_atomically

RANKS = (1, 2, 4, 8, 16, 32, 64)
TOLD = ("rewards/accuracies", "loss", "rewards/margins", "displacement", "kl")


@dataclass(frozen=True)
class Arm:
    """What one arm does.

    Attributes:
        preference: Whether it trains on pairs.
        sft: Whether it imitates the chosen answers, before that if both.
        nll: Weight of SFT's loss as a term beside DPO's.
        r: Rank of the adapters; 0 trains all parameters.
    """

    preference: bool = True
    sft: bool = False
    nll: float = 0.0
    r: int = 8


ARMS: dict[str, Arm] = {
    "dpo": Arm(),
    "sft": Arm(preference=False, sft=True),
    "sft-dpo": Arm(sft=True),
    "dpo-nll": Arm(nll=0.2),
    **{f"rank-{r}": Arm(r=r) for r in RANKS},
    "full": Arm(r=0),
}


def run_arm(arm: Arm, budget: Budget, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train an arm and return its numbers on the held-out pairs, against the base."""
    began = time.perf_counter()
    seed_everything(seed, verbose=False)
    lr = options.lr if arm.r else options.full_lr
    shared: dict[str, Any] = {
        "lora": adapter_of(options.model, arm.r, "all-linear") if arm.r else None,
        "optimizer": partial(AdamW, lr=lr, weight_decay=0.0),
        "warmup_steps": 0.1,
    }
    # The base as it is, whose log-probs are kept from one run to the next.
    compared = {"reference": options.model, "reference_cache": str(options.out / "references")}
    place = options.out / "policy.ckpt"
    start: str | None = None
    if arm.sft:
        answers = HHSFTDataModule(
            options.model, options.data, splits=HELD_OUT, seed=seed, **batches_of(budget)
        )
        with trained(SFTModule(options.model, **shared), answers, budget, 0) as trainer:
            trainer.save_checkpoint(place)
        start = str(place)
    pairs = pairs_of(options.model, options.data, budget, seed)
    loss: PreferenceLoss = DPO(beta=options.beta)
    if arm.preference:
        objective = WeightedSum((loss, ChosenNLL()), (1.0, arm.nll)) if arm.nll else loss
        against = {} if start else compared
        module = DPOModule(options.model, loss=objective, init_from=start, **against, **shared)
        with trained(module, pairs, budget, 0) as trainer:
            trainer.save_checkpoint(place)
    # However it was trained, the policy is read back and compared with the base under one loss.
    policy = DPOModule(options.model, loss=loss, init_from=str(place), **compared, **shared)
    judge = Trainer(
        accelerator="auto", devices=1, precision=budget.precision,  # type: ignore[arg-type]
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (found,) = judge.validate(policy, pairs, verbose=False)
    place.unlink()
    trainable = sum(each.numel() for each in policy.parameters() if each.requires_grad)
    seconds = time.perf_counter() - began
    numbers = {name: float(found[f"val/{name}"]) for name in TOLD}
    return {**numbers, "trainable": trainable, "seconds": seconds}


def run(options: argparse.Namespace, budget: Budget, console: Console) -> int:
    """Run the arms that are missing, each as often as there are seeds; then tell and draw."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlignkitError(
            f"--out {options.out}: cannot be made a folder: {error.strerror}"
        ) from None
    lines = options.out / "study.jsonl"
    settled = {
        "budget": asdict(budget),
        "content": content_of(options),
        **{name: getattr(options, name) for name in ("beta", "lr", "full_lr")},
    }
    done = read_lines(lines, settled)
    about = machine.describe(resolve_device("auto")) | {"command": output.command()}
    for seed in range(options.seeds):  # every arm once before any arm twice
        for name in options.arms:
            if (name, seed) in done:
                continue
            found = run_arm(ARMS[name], budget, options, seed)
            done[name, seed] = found
            line = {"arm": name, "seed": seed, **found, "settings": settled, "machine": about}
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            console.print(
                f"{name} {seed}: accuracy {found[TOLD[0]]:.3f}, {found['seconds']:.0f} s",
                highlight=False,
            )
    results = {
        name: [found for (arm, _), found in sorted(done.items()) if arm == name]
        for name in ARMS
        if any(arm == name for arm, _ in done)
    }
    console.print(table(results))
    draw(results, options.out / "study.png")
    return 0


def read_lines(path: Path, settled: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the runs of a file by arm and seed, and remove a line that was cut off.

    Raises:
        AlignkitError: They had other settings, another model or other data.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if not path.exists():
        return found
    written = path.read_text(encoding="utf-8")
    whole = written[: written.rfind("\n") + 1]
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            place, others = (line["arm"], line["seed"]), line["settings"]
        except (ValueError, KeyError, TypeError):
            raise AlignkitError(f"{path}:{number}: is no line of this study") from None
        if others != settled:
            raise AlignkitError(
                f"{path}:{number}: was run with other settings, another model or other data; name "
                "another --out"
            )
        found[place] = line
    if whole != written:  # the run that wrote it was stopped
        write_atomically(path, whole)
    return found


def told(runs: list[dict[str, Any]], name: str) -> tuple[float, float | None]:
    """Return the mean over seeds and its standard error, none for one run."""
    values = [run[name] for run in runs]
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def table(results: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Return the arms as a table of Markdown."""
    shown = Table(
        title="held-out pairs against the base, mean over seeds ± standard error", box=box.MARKDOWN
    )
    for header in ("arm", "seeds", "accuracy", "loss", "margin", "displaced", "KL", "trained"):
        shown.add_column(header)
    for name, runs in results.items():
        numbers = [
            f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            for value, error in (told(runs, metric) for metric in TOLD)
        ]
        shown.add_row(name, str(len(runs)), *numbers, f"{runs[0]['trainable']:,}")
    return shown


def draw(results: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy and margin of every arm with their standard errors."""
    figure, axes = new_figure(2)
    for axis, metric, title in zip(
        axes, TOLD[::2], ("held-out accuracy", "held-out margin"), strict=False
    ):
        points = [told(runs, metric) for runs in results.values()]
        axis.errorbar(
            [value for value, _ in points],
            range(len(points)),
            xerr=[error or 0.0 for _, error in points],
            fmt="o",
            color=COLORS[0],
        )
        axis.set_yticks(range(len(points)), list(results))
        axis.invert_yaxis()
        axis.set_title(title)
    save(figure, path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_run_flags(flags)
    add = flags.add_argument
    add("--out", type=Path, required=True, help="folder for the runs' lines and the picture")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--beta", type=float, default=0.1, help="of DPO")
    add("--lr", type=float, default=2e-4, help="of adapters")
    add("--full-lr", type=float, default=1e-5, help="of all parameters")
    return flags.parse_args()


def main() -> int:
    """Run the study; returns 2 for a user's mistake."""
    quiet()
    options = parse()
    try:
        return run(options, budget_of(options), Console())
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
