"""What one process of a measurement does: plain values that travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

Task = Literal["dpo", "sft", "lm"]
Precision = Literal["bf16-mixed", "32-true"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: As the results call it.
        package: Whose training loop runs.
        dtype: Of the base's weights; adapters are always fp32.
        mixed: bf16 autocast, which is what all three libraries train with by default.
        checkpointing: Recompute activations in the backward pass.
        by_length: Its batches hold examples of like length.
        padding_free: A batch is one row without padding (TRL has it for SFT alone).
        adapters: Train low-rank adapters; otherwise the whole model.
    """

    name: str
    package: Literal["alignkit", "trl", "peft"]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mixed: bool = True
    checkpointing: bool = False
    by_length: bool = False
    padding_free: bool = False
    adapters: bool = True

    def in_precision(self, precision: Precision) -> Arm:
        """Return the arm as it trains in a precision; fp32 goes for weights and products alike."""
        return self if precision == "bf16-mixed" else replace(self, dtype="float32", mixed=False)


@dataclass(frozen=True)
class Job:
    """An arm with its data and steps.

    Attributes:
        arm: Who trains.
        task: The objective.
        model: A directory that transformers loads.
        tokenizer: A directory with a tokenizer, for the libraries that want one.
        adapter: A PEFT directory, loaded by every arm that trains adapters.
        lora: The adapter's rank, alpha and targets.
        examples: A JSON file, see `setup.write_examples`.
        scored: Examples whose responses' log-probs are reported before training starts.
        steps: Example numbers of every optimizer step, in order.
        micro_batches: Into how many batches a step is cut.
        device: ``cpu`` or ``cuda``.
        lead_in: How many steps of every turn are not measured, to refill a GPU's memory pool.
    """

    arm: Arm
    task: Task
    model: str
    tokenizer: str
    adapter: str
    lora: dict[str, object]
    examples: str
    scored: list[int]
    steps: list[list[int]]
    micro_batches: int = 1
    device: str = "cpu"
    lead_in: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        """Read what `to_json` wrote."""
        values = json.loads(line)
        return cls(**{**values, "arm": Arm(**values["arm"])})


# What every arm trains with, written once so that it cannot differ.
LEARNING_RATE = 2e-4
CLIP_NORM = 1.0
BETA = 0.1
