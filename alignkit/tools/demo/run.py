"""Run ``alignkit demo``: the three stages on a small model, through the command line itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.tools.configs import configs_folder
from alignkit.tools.curves import read_scalars
from alignkit.tools.demo.accuracy import preference_accuracy
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.preferences import write_preferences
from alignkit.tools.demo.prose import write_prose
from alignkit.utils.atomic import write_atomically
from alignkit.utils.products import faster_dtype

RUNS = Path("runs/demo")
STAGES = ("lora", "sft", "dpo")
_PROMPTS = 4
_LAST = 5  # steps averaged for the loss at the end, as single batches vary much

console = Console()


@dataclass
class Stage:
    """Hold the numbers of one stage in the summary; losses are in nats.

    Example:
        >>> Stage("sft", seconds=90.0, train_start=3.1, train_end=2.4, held_out=2.5).name
        'sft'

    Attributes:
        name: The stage: ``lora``, ``sft`` or ``dpo``.
        seconds: Wall time of its training.
        train_start: Training loss of its first step.
        train_end: Mean training loss of its last steps.
        held_out: Validation loss at its end.
    """

    name: str
    seconds: float
    train_start: float
    train_end: float
    held_out: float


def demo(base: str | None = None, max_steps: int | None = None) -> None:
    """Run LoRA, SFT and DPO in turn, compare the answers and print a summary.

    Args:
        base: A model to use instead of SmolLM2-135M-Instruct: anything ``model.base`` takes.
        max_steps: Optimizer steps of each stage, instead of what the configs say.

    Raises:
        AlignkitError: A missing package, or a command that failed.
    """
    started = time.monotonic()
    for name in STAGES:  # remove the runs of an earlier demo
        shutil.rmtree(RUNS / name, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)

    console.rule("model and data")
    base = base or str(prepare_model(RUNS / "model"))
    write_prose(RUNS / "prose")
    write_preferences(RUNS / "preferences")
    dtype = faster_dtype()
    print(f"model {base} in {dtype}, data in {RUNS}")

    options = ["--model.base", base, "--model.dtype", dtype]
    options += ["--trainer.precision", "bf16-mixed" if dtype == "bfloat16" else "32-true"]
    if max_steps is not None:
        options += ["--trainer.max_steps", str(max_steps)]
        options += ["--trainer.val_check_interval", str(max_steps)]
    done: list[Stage] = []
    for name in STAGES:
        chained = ["--model.init_from", checkpoint(done[-1].name)] if done else []
        done.append(fit(name, options + chained))

    console.rule("answers, and held-out pairs")
    accuracies = [
        preference_accuracy(checkpoint(name), RUNS / "preferences", getattr(torch, dtype))
        for name in ("sft", "dpo")
    ]
    compare(base, dtype)
    console.rule(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    summarise(done, *accuracies)


def fit(name: str, options: list[str]) -> Stage:
    """Train one stage and read its losses back from its TensorBoard run."""
    console.rule(f"stage {name}")
    started = time.monotonic()
    run_command("fit", "--config", str(configs_folder() / "demo" / f"{name}.yaml"), *options)
    scalars = read_scalars(RUNS / name)
    train = [loss for _, loss in scalars["train/loss"]]
    last = train[-_LAST:]
    held_out = scalars["val/loss"][-1][1]
    return Stage(name, time.monotonic() - started, train[0], sum(last) / len(last), held_out)


def compare(base: str, dtype: str) -> None:
    """Ask the model about subjects of the test pairs, as it came and after SFT and DPO."""
    models = [f"base={base}", f"sft={checkpoint('sft')}", f"dpo={checkpoint('dpo')}"]
    prompts = RUNS / "prompts.jsonl"
    lines = (RUNS / "preferences" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(line)["chosen"] for line in lines]
    turns = [dialogue.split("\n\n")[1:] for dialogue in dialogues]
    asked = [t[0] for t in turns if len(t) == 2 and t[0].count("?") == 1][:_PROMPTS]
    rows = (json.dumps({"prompt": question.removeprefix("Human: ")}) for question in asked)
    write_atomically(prompts, "\n".join(rows) + "\n")
    flags = {
        "--prompts_file": str(prompts),
        "--temperature": "0",
        "--repetition_penalty": "1.1",
        "--max_new_tokens": "64",
        "--dtype": dtype,
        "--markdown": str(RUNS / "compare.md"),
    }
    (RUNS / "compare.md").unlink(missing_ok=True)
    run_command("compare", "--models", *models, *(part for flag in flags.items() for part in flag))


def summarise(stages: list[Stage], before: float, after: float) -> None:
    """Print a table of the stages, the held-out accuracies, and how to see more."""
    table = Table("stage", "minutes", "training loss, start", "end", "held-out loss, end")
    for stage in stages:
        losses = (stage.train_start, stage.train_end, stage.held_out)
        table.add_row(stage.name, f"{stage.seconds / 60:.1f}", *(f"{loss:.3f}" for loss in losses))
    console.print(table)
    reward = read_scalars(RUNS / "dpo")["val/rewards/accuracies"][-1][1]
    console.print(
        f"held-out pairs whose helpful answer is the likelier one: {before:.1%} before DPO, "
        f"{after:.1%} after"
    )
    console.print(
        f"held-out pairs that DPO's reward ranks right: 50.0% by chance before, {reward:.1%} after"
    )
    console.print(f"side by side: {RUNS / 'compare.md'}")
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    console.print(f"curves: {tensorboard} --logdir {RUNS}", soft_wrap=True)


def run_command(*arguments: str) -> None:
    """Run an ``alignkit`` command in this process, after printing it as one would type it.

    Raises:
        AlignkitError: The command failed.
    """
    console.print("$ alignkit " + " ".join(arguments), style="bold", soft_wrap=True)
    if main(arguments) != 0:
        raise AlignkitError(f"demo: alignkit {arguments[0]} failed, for the reason above")


def checkpoint(name: str) -> str:
    """Return the folder of a stage's runs, which stands for its newest checkpoint."""
    return str(RUNS / name)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `demo`, which takes what ``parser`` returns as keyword arguments."""
    parser.add_function_arguments(demo)
