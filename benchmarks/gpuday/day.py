"""What every part is given: the device, the sizes, the figures and the time that is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sidebyside.examples import of_lengths, read_lengths
from sidebyside.flops import matmul_ceiling
from sidebyside.job import Task
from sidebyside.shapes import SHAPES, write_random_model

from alignkit.engine import Example
from gpuday.record import Figures

LENGTHS = Path(__file__).parents[1] / "hh_lengths.json"


class NotRun(Exception):
    """A part, or the rest of it, cannot run here; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        contests: Tasks and shapes that are compared with the peers, the most telling first.
        per_step: Examples of an optimizer step.
        steps: Optimizer steps of a turn.
        rounds: Turns of every arm.
        row: Most tokens of one of alignkit's rows beside peers.
        rows: The same, where rows of growing length are measured.
        lm_tokens: Tokens of a document in language modelling.
        shapes: Models of the parts that have no peers, the most telling first.
        heads: Heads and head width of attention alone.
        matmul: Of the product that measures the ceiling.
        copy_bytes: Of the copy that measures bandwidth.
        trainer_steps: Optimizer steps of the run with Lightning's Trainer.
        repeats: How often a short thing is timed within a round.
    """

    contests: tuple[tuple[Task, str], ...]
    per_step: int
    steps: int
    rounds: int
    row: int
    rows: tuple[int, ...]
    lm_tokens: int
    shapes: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    matmul: int
    copy_bytes: int
    trainer_steps: int
    repeats: int


FULL = Sizes(
    contests=(
        ("dpo", "pythia-1.4b-shape"),
        ("sft", "pythia-1.4b-shape"),
        ("dpo", "gpt2-shape"),
        ("sft", "gpt2-shape"),
        ("lm", "gpt2-shape"),
        ("lm", "pythia-1.4b-shape"),
    ),
    per_step=64,
    steps=2,
    rounds=3,
    row=16384,
    rows=(2048, 4096, 8192, 16384, 32768),
    lm_tokens=512,
    shapes=("pythia-1.4b-shape", "gpt2-shape"),
    heads=((16, 128), (12, 64)),
    matmul=8192,
    copy_bytes=4 << 30,
    trainer_steps=40,
    repeats=10,
)
TINY = Sizes(
    contests=tuple((task, "tiny-gpt2-shape") for task in ("dpo", "sft", "lm")),
    per_step=4,
    steps=1,
    rounds=1,
    row=1024,
    rows=(512, 1024),
    lm_tokens=32,
    shapes=("tiny-llama-shape",),
    heads=((2, 16),),
    matmul=128,
    copy_bytes=1 << 20,
    trainer_steps=4,
    repeats=1,
)


@dataclass
class Day:
    """What a part is given.

    Attributes:
        figures: Where its figures go.
        device: ``cuda`` or ``cpu``.
        tiny: Whether to try everything with sizes of no interest.
        scratch: A folder for what is made on the way.
        lengths: Token counts of real pairs.
        part: The part that runs.
        deadline: After this reading of `time.monotonic` it begins no further round.
        models: The random models written so far, by shape.
    """

    figures: Figures
    device: str
    tiny: bool
    scratch: Path
    lengths: list[list[int]]
    part: str = ""
    deadline: float = float("inf")
    models: dict[str, str] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    @property
    def sizes(self) -> Sizes:
        """How large everything is."""
        return TINY if self.tiny else FULL

    def note(self, name: str, value: Any, unit: str, **settings: Any) -> None:
        """Write a figure of the part that runs."""
        self.figures.add(self.part, name, value, unit, **settings)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        self.console.print(f"{self.part}: {name} = {shown} {unit}", highlight=False, markup=False)

    def has(self, name: str) -> bool:
        """Whether the part that runs has this figure, from an earlier run."""
        return self.figures.has(self.part, name)

    def is_late(self) -> bool:
        """Whether the part's share of the time is used."""
        return self.seconds_left() < 0

    def seconds_left(self) -> float:
        """Seconds of the part's share that are left."""
        return self.deadline - time.monotonic()

    def model(self, shape: str) -> str:
        """A directory with a shape's random weights in bf16, made once a run."""
        if shape not in self.models:
            directory = self.scratch / shape
            write_random_model(shape, directory, seed=0, device=self.device)
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.models[shape] = str(directory)
        return self.models[shape]

    def examples(self, task: Task, shape: str, count: int, seed: int = 0) -> list[Example]:
        """Random token ids in examples as long as real ones."""
        return of_lengths(task, count, SHAPES[shape].vocab_size, self.lengths, seed)

    def ceiling(self) -> float:
        """FLOP/s of a large bf16 product: as measured today, or measured now."""
        known: float | None = self.figures.value("ceiling", "bf16 matmul")
        return known * 1e12 if known else matmul_ceiling(self.device, self.sizes.matmul)


def lengths_of(path: str | None) -> list[list[int]]:
    """Token counts from a file, or those of HH-RLHF's pairs that lie beside the benchmarks."""
    return read_lengths(path or str(LENGTHS))
