"""The same road as TRL: DPO step by step in both libraries, and what each says of it.

    python benchmarks/road.py --model DIR --data HH_DIR --json road.json --plot road.png

Both take the same pairs in the same order, from one adapter, with one learning rate. Every number
is the one that the library itself logs: the losses and rewards of each step, and the held-out
metrics of pairs that no step takes. In fp32 the two may differ by rounding alone, which the steps
amplify; the largest differences are printed. TRL counts a tie as wrong and alignkit as half right,
so that accuracies differ before the first step, where every pair ties.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from sidebyside import machine, options, output
from sidebyside.arm_alignkit import build, micro_batches
from sidebyside.examples import draw
from sidebyside.job import CLIP_NORM, Arm, Job
from sidebyside.script import measure
from sidebyside.setup import prepare, write_adapter, write_examples
from torch.utils.data import DataLoader

from alignkit.engine import Example, PackedBatch, collate
from alignkit.errors import AlignkitError
from alignkit.tools.plots import COLORS, new_figure, save

_STEPS = {"cpu": 60, "cuda": 200}
_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_HELD_OUT_BATCH = 8
Curves = dict[str, dict[int, float]]
"""Of each name, its values by the number of steps taken; held-out ones begin with ``val/``."""


@dataclass(frozen=True)
class Chosen(options.Common):
    """What this script is told.

    Attributes:
        steps: Optimizer steps.
        pairs: Of each step.
        held_out: Pairs of the held-out metrics.
        every: Steps between them.
    """

    steps: int
    pairs: int
    held_out: int
    every: int


def run(chosen: Chosen, console: Console, work: Path) -> dict[str, Any]:
    """Train both, print how far they are apart; returns what is written to the file of numbers."""
    if chosen.held_out % _HELD_OUT_BATCH:
        raise AlignkitError(
            f"--held-out: give a multiple of {_HELD_OUT_BATCH}, got {chosen.held_out}"
        )
    if 2 * chosen.every > chosen.steps:
        raise AlignkitError(f"--every {chosen.every}: give half of --steps {chosen.steps} at most")
    shared = prepare(chosen, work)
    adapter = work / "fresh"
    write_adapter(shared.config, shared.lora, adapter, chosen.seed, std_b=0.0)
    trained = chosen.steps * chosen.pairs
    found = draw(
        "dpo", trained + chosen.held_out, chosen, shared.tokenizer, shared.config.vocab_size
    )
    examples, held_out = found[:trained], found[trained:]

    def job(package: Any) -> Job:
        return Job(
            arm=Arm(package, package).in_precision(chosen.precision),
            task="dpo",
            model=shared.model,
            tokenizer=shared.tokenizer,
            adapter=str(adapter),
            lora=shared.lora.to_dict(),
            examples=write_examples(examples, work / "examples.json"),
            scored=[],
            steps=[
                list(range(start, start + chosen.pairs))
                for start in range(0, trained, chosen.pairs)
            ],
            device=chosen.device,
        )

    curves: dict[str, Curves] = {}
    with console.status("alignkit"):
        curves["alignkit"] = with_alignkit(job("alignkit"), examples, held_out, chosen.every)
    with console.status("TRL"):
        curves["trl"] = with_trl(job("trl"), examples, held_out, chosen.every)
    apart = differences(curves)
    show(console, curves, apart)
    draw_curves(chosen.plot, curves)
    return {
        "largest_differences": apart,
        "curves": curves,
        "machine": machine.describe(chosen.device)
        | {"model": chosen.model, "command": output.command()},
    }


def with_alignkit(
    job: Job, examples: Sequence[Example], held_out: Sequence[Example], every: int
) -> Curves:
    """Train with alignkit's module and return what it logs."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    steps: DataLoader[PackedBatch] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list is a map-style data set
        batch_sampler=list(micro_batches(job, examples)),
        collate_fn=collate,
    )
    others: DataLoader[PackedBatch] = DataLoader(
        held_out,  # type: ignore[arg-type]
        batch_size=_HELD_OUT_BATCH,
        collate_fn=collate,
    )
    logged = Logged()
    trainer = Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if job.arm.mixed else "32-true",
        max_steps=len(job.steps),
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=CLIP_NORM,
        callbacks=[logged],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(job), steps, others)
    return logged.curves


class Logged(Callback):
    """Keep what a run logs, by step."""

    def __init__(self) -> None:
        self.curves: Curves = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._keep(trainer, "train/", "")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, "val/", "val/")

    def _keep(self, trainer: Trainer, theirs: str, ours: str) -> None:
        for name in _NAMES:
            value = float(trainer.callback_metrics[theirs + name])
            self.curves.setdefault(ours + name, {})[trainer.global_step] = value


def with_trl(
    job: Job, examples: Sequence[Example], held_out: Sequence[Example], every: int
) -> Curves:
    """Train with TRL's DPOTrainer and return what it logs."""
    from sidebyside.arm_huggingface import build
    from sidebyside.arm_trl import dpo_trainer
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        trainer = dpo_trainer(
            job,
            examples,
            build(job),
            AutoTokenizer.from_pretrained(job.tokenizer),
            directory,
            held_out=held_out,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=every,
            per_device_eval_batch_size=_HELD_OUT_BATCH,
        )
        trainer.job, trainer.parts = job, []
        trainer.train()
    curves: Curves = {}
    for entry in trainer.state.log_history:
        for name in _NAMES:
            for theirs, ours in ((name, name), (f"eval_{name}", f"val/{name}")):
                if theirs in entry:
                    curves.setdefault(ours, {})[int(entry["step"])] = float(entry[theirs])
    return curves


def differences(curves: dict[str, Curves]) -> dict[str, float]:
    """Return the largest absolute difference of each name over the steps.

    Raises:
        AlignkitError: One library logged what the other did not.
    """
    ours, theirs = curves["alignkit"], curves["trl"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name, {}).keys() != theirs.get(name, {}).keys():
            raise AlignkitError(f"{name}: the libraries logged it at different steps")
    return {
        name: max(abs(value - theirs[name][step]) for step, value in values.items())
        for name, values in ours.items()
    }


def show(console: Console, curves: dict[str, Curves], apart: dict[str, float]) -> None:
    """Print the first and last values, and the largest differences."""
    table = Table()
    for header in ("", "first", "last", "TRL's last", "largest difference"):
        table.add_column(header, justify="right" if header else "left")
    for name, values in curves["alignkit"].items():
        first, *_, last = values.values()
        theirs = list(curves["trl"][name].values())[-1]
        numbers = (f"{first:.4f}", f"{last:.4f}", f"{theirs:.4f}", f"{apart[name]:.1e}")
        table.add_row(name, *numbers)
    console.print(table)


def draw_curves(path: Path | None, curves: dict[str, Curves]) -> None:
    """Draw both libraries' curves over the steps, if a file was asked for."""
    if path is None:
        return
    panels = (
        ("loss", "loss of each step"),
        ("rewards/margins", "reward margin of each step"),
        ("val/loss", "held-out loss"),
        ("val/rewards/margins", "held-out reward margin"),
        ("val/rewards/accuracies", "held-out accuracy"),
        ("val/rewards/chosen", "held-out reward of the chosen answer"),
    )
    figure, axes = new_figure(len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for library, style in (("alignkit", "-"), ("trl", "o")):
            found = cast("dict[int, float]", curves[library][name])
            axis.plot(
                list(found),
                list(found.values()),
                style,
                color=COLORS[library == "trl"],
                markerfacecolor="none",
                label={"alignkit": "alignkit", "trl": "TRL"}[library],
            )
        axis.set_title(title)
        axis.set_xlabel("optimizer steps")
    axes[0].legend()
    save(figure, path)


def parse() -> Chosen:
    """Read the command line."""
    flags = options.common_parser("The same road as TRL, step by step.", rounds=1)
    flags.add_argument("--steps", type=int, help="optimizer steps")
    flags.add_argument("--pairs", type=int, default=4, help="of each step")
    flags.add_argument("--held-out", type=int, default=32, help="pairs that no step takes")
    flags.add_argument("--every", type=int, default=10, help="steps between held-out metrics")
    flags.set_defaults(precision="32-true")
    values = flags.parse_args()
    for name, given in (
        ("rounds", values.rounds != 1),
        ("tokens-per-batch", values.tokens_per_batch),
    ):
        if given:
            raise AlignkitError(f"--{name}: one run takes each step in one row; leave it out")
    return Chosen(**options.read_alone(values, steps=_STEPS))


if __name__ == "__main__":
    sys.exit(measure(parse, run))
