"""Turn what two simulated steps took into the memory of any number of tokens, and show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from alignkit.tools.plan.model import Weights
from alignkit.tools.plan.step import PHASES, Measured

SLACK = {"cpu": 0.5, "cuda": 0.1}
"""What allocators hold beyond live tensors, as a share of those that come and go.

That of the CPU is glibc's, as `benchmarks/plan.py` finds it.
"""
SLACK_RECOMPUTED = {**SLACK, "cpu": 1.6}
"""The same where activations are recomputed, so that blocks of all sizes come and go again."""
HEADROOM = 0.1
"""Share of the device that a proposal leaves free."""
_STEP = 64
_MOST = 2**16
_MIB = 2**20


@dataclass(frozen=True)
class Line:
    """Hold a number of bytes that grows with the tokens of a row.

    Example:
        >>> Line.through(100, 5_000, 200, 7_000)(300)
        9000
    """

    fixed: float
    each: float

    @classmethod
    def through(cls, tokens: int, low: int, more_tokens: int, high: int) -> Line:
        """Return the line through two measurements, which never falls."""
        each = max(0.0, (high - low) / (more_tokens - tokens))
        return cls(low - each * tokens, each)

    def __call__(self, tokens: int) -> int:
        """Return the bytes for so many tokens."""
        return max(0, round(self.fixed + self.each * tokens))


@dataclass(frozen=True)
class Plan:
    """Hold the memory of a run, and the budget of tokens that its device has room for.

    Attributes:
        what: What is planned: stage, base, precision.
        parameters: Numbers of the base's and the trained parameters.
        device: Name of the device.
        memory: Its bytes.
        program: Bytes of the process itself, on a device whose memory holds it.
        weights: What the models take.
        gradients: Bytes of gradients, and of DDP's buckets with several processes.
        states: Bytes of the optimizer's states.
        kept: Activations that are kept for the backward pass, by tokens.
        logits: What the head takes while it scores a chunk.
        phases: The most beside the weights during each phase of a step, by tokens.
        tokens: The configuration's ``tokens_per_batch``.
        longest: Tokens of the longest example.
        slack: What the device's allocator adds, see `SLACK`.

    Example:
        >>> weights = Weights(base=500, trained=10, reference=0, loading=500, checking=0)
        >>> small = Plan({}, {"base": 250, "trained": 5}, "a device", memory=10_000, program=0,
        ...              weights=weights, gradients=10, states=20, kept=Line(0, 2), logits=5,
        ...              phases={"backward": Line(100, 4)}, tokens=128, longest=64, slack=0.0)
        >>> small.peak(128)
        1122
        >>> small.proposal()
        2048
    """

    what: dict[str, Any]
    parameters: dict[str, int]
    device: str
    memory: int
    program: int
    weights: Weights
    gradients: int
    states: int
    kept: Line
    logits: int
    phases: Mapping[str, Line]
    tokens: int
    longest: int
    slack: float

    def step(self, tokens: int) -> tuple[str, int]:
        """Return the phase of a step that takes most, and its bytes with allocators' slack."""
        phase = max(self.phases, key=lambda name: self.phases[name](tokens))
        return phase, round(self.phases[phase](tokens) * (1 + self.slack))

    def peak(self, tokens: int) -> int:
        """Return the most bytes of the run at a number of tokens for each batch."""
        weights = self.weights
        start = max(weights.loading, weights.at_rest + weights.checking)
        return self.program + max(start, weights.at_rest + self.step(tokens)[1])

    def proposal(self) -> int:
        """Return the largest budget that leaves `HEADROOM` free; 0 where none does."""
        room = self.memory * (1 - HEADROOM)
        fitting = (n for n in range(_MOST, 0, -_STEP) if self.peak(n) <= room)
        found = next(fitting, 0)
        return found if found >= min(self.longest, _MOST) else 0

    def rows(self) -> list[list[str]]:
        """Return the table's rows: what, and its MiB at the configuration's tokens."""
        phase, step = self.step(self.tokens)
        weights, kept = self.weights, self.kept(self.tokens)
        live = self.phases[phase](self.tokens)
        own = self.gradients + self.states
        rows = [
            ("the process itself", self.program),
            ("base", weights.base),
            ("trained weights", weights.trained),
            ("reference, beside what it shares", weights.reference),
            ("gradients", self.gradients),
            ("optimizer states", self.states),
            (f"activations kept, {self.kept.each / 1024:,.0f} KiB a token", kept),
            (f"working memory of the {phase}", max(0, live - kept - own)),
            ("allocator", step - live),
        ]
        total = sum(size for _, size in rows)
        peak = self.peak(self.tokens)
        if peak > total:
            rows.append(("loading and checking the base, before", peak - total))
        return [[name, f"{size / _MIB:,.0f}"] for name, size in [*rows, ("peak", peak)] if size]

    def to_table(self) -> Table:
        """Return the rows for the terminal."""
        table = Table()
        table.add_column(f"{self.tokens:,} tokens a batch")
        table.add_column("MiB", justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def caption(self) -> list[str]:
        """Return the lines around the table: what trains, and what the device has room for."""
        trained, base = self.parameters["trained"], self.parameters["base"]
        about = ", ".join(f"{value}" for value in self.what.values() if value)
        lines = [
            about,
            f"training {trained:,} parameters; the base has {base:,}",
            f"{self.device}: {self.memory / 2**30:,.1f} GiB",
        ]
        best = self.proposal()
        if best:
            more = " or more" if best == _MOST else ""
            lines.append(
                f"data.tokens_per_batch: {best}{more} fits, {HEADROOM:.0%} left free "
                f"(peak {self.peak(best) / 2**30:,.2f} GiB)"
            )
        else:
            lines.append(
                f"no budget fits: one example of {self.longest} tokens takes "
                f"{self.peak(self.longest) / 2**30:,.2f} GiB; quantize the base, set "
                "model.activation_checkpointing, or lower data.max_length"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return every number as plain values, in bytes."""
        best = self.proposal()
        return {
            **self.what,
            "parameters": self.parameters,
            "device": {"name": self.device, "bytes": self.memory},
            "bytes": {
                "program": self.program,
                **asdict(self.weights),
                "gradients": self.gradients,
                "optimizer": self.states,
                "activations": self.kept(self.tokens),
                "activations_per_token": round(self.kept.each),
                "logits_chunk": self.logits,
                "step": self.step(self.tokens)[1],
                "peak": self.peak(self.tokens),
            },
            "phases": {name: line(self.tokens) for name, line in self.phases.items()},
            "tokens_per_batch": self.tokens,
            "fits": self.peak(self.tokens) <= self.memory,
            "proposed": {"tokens_per_batch": best, "peak": self.peak(best) if best else None},
        }


def phase_lines(less: Measured, more: Measured) -> dict[str, Line]:
    """Return the line of each phase through two measurements."""
    return {
        name: Line.through(less.tokens, less.peaks[name], more.tokens, more.peaks[name])
        for name in PHASES
        if name in less.peaks
    }
