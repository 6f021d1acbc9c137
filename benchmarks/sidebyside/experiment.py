"""A whole comparison: prepare, check parity, let the arms train in turns, sum up."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from alignkit.engine import Example
from alignkit.lora import inject_lora, trainable_parameter_count
from sidebyside import examples as sources
from sidebyside import machine, parity
from sidebyside.flops import Costs, matmul_ceiling, step_flops
from sidebyside.job import Arm, Job, Task
from sidebyside.options import Options
from sidebyside.plan import (
    OURS,
    Plan,
    examples_needed,
    make_plan,
    our_micro_batches,
)
from sidebyside.runner import Taken, Worker
from sidebyside.setup import Shared, empty_model, perturbed_adapter, prepare, write_examples


@dataclass(frozen=True)
class Contest:
    """Who is compared.

    Attributes:
        task: The objective.
        ours: alignkit's arm.
        peers: The others, in the order in which they take turns.
        truth: The peer that is also run in fp32.
        fair: The peer that alignkit's bf16 errors are held against.
    """

    task: Task
    ours: Arm
    peers: tuple[Arm, ...]
    truth: str
    fair: str


@dataclass(frozen=True)
class Round:
    """One peer's turn beside alignkit's, on the same steps."""

    peer: Taken
    ours: Taken
    steps: list[list[int]]


@dataclass(frozen=True)
class Outcome:
    """What a comparison found; ``rounds`` is empty where the parity gate refused.

    Attributes:
        parity: See `parity.judge`.
        rounds: By peer.
        flops: Of each peer's rounds: FLOPs of the measured steps, for alignkit and for the peer.
        ceiling: The machine's FLOP/s.
        examples_per_turn: Measured ones.
        loaded_bytes: By arm, memory in use before the first step.
        machine: Where.
    """

    parity: dict[str, Any]
    rounds: dict[str, list[Round]]
    flops: dict[str, list[tuple[float, float]]]
    ceiling: float
    examples_per_turn: int
    loaded_bytes: dict[str, int]
    machine: dict[str, Any]


@dataclass(frozen=True)
class Bounds:
    """What holds a run short.

    Attributes:
        deadline: After this reading of `time.monotonic` no round but the first begins.
        whatever: Time arms that parity refuses as well; the verdict stands beside the times.
        ceiling: The machine's FLOP/s; measured before and after where it is not given.
        tell: Is given every round's number and its turns by peer, as soon as it is over.
    """

    deadline: float = math.inf
    whatever: bool = False
    ceiling: float | None = None
    tell: Callable[[int, Mapping[str, Round]], None] = lambda number, turns: None


def compare(
    contest: Contest, options: Options, console: Console, bounds: Bounds | None = None
) -> Outcome:
    """Run a contest.

    Raises:
        AlignkitError: Something the user named is missing or bad, or an arm failed.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as directory:
        return _Comparison(contest, options, console, Path(directory), bounds or Bounds()).run()


class _Comparison:
    def __init__(
        self, contest: Contest, options: Options, console: Console, work: Path, bounds: Bounds
    ) -> None:
        self.contest, self.options, self.console, self.work = contest, options, console, work
        self.bounds = bounds
        with console.status("model and adapter"):
            self.shared: Shared = prepare(options, work)
        peer_batches = -(-options.per_step // options.peer_batch)
        # Ours depends on the tokens of the longest step, which is known only once they are dealt;
        # a parity step must have an example for every micro-batch of either side.
        self.examples, self.plan = self._deal(max(2, peer_batches))
        steps = [s for turns in self.plan.rounds for turn in turns for s in turn.steps]
        our_batches = our_micro_batches(steps, self.examples, options.tokens_per_batch)
        if our_batches > max(2, peer_batches):
            self.examples, self.plan = self._deal(our_batches)
        self.path = write_examples(self.examples, work / "examples.json")
        self.micro_batches = {"alignkit": our_batches, "trl": peer_batches, "peft": peer_batches}
        self.lead_in = int(options.device == "cuda")

    def run(self) -> Outcome:
        bounds, parity_steps = self.bounds, self.options.parity_steps
        dtype = getattr(torch, self.options.dtype)
        ceiling = bounds.ceiling or matmul_ceiling(self.options.device, dtype=dtype)
        arms = (self.contest.ours, *self.contest.peers)
        timed = {arm.name: arm.in_precision(self.options.precision) for arm in arms}
        exact = {} if self.options.precision == "32-true" else self._exact()
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            traces: dict[str, parity.Trace] = {}
            for label, arm in (exact | timed).items():
                if self.options.device == "cuda":  # there are cores to load them side by side
                    workers[label] = stack.enter_context(self._start(label, arm, label in exact))
            for label, arm in (exact | timed).items():
                with self.console.status(f"{label}: loading, {parity_steps} parity steps"):
                    if label not in workers:
                        worker = self._start(label, arm, label in exact)
                        workers[label] = stack.enter_context(worker)
                    workers[label].ready()
                    losses = workers[label].take(parity_steps).losses
                if label in exact:
                    workers[label].close()
                if arm.adapters:  # full fine-tuning trains another model
                    traces[label] = parity.Trace(workers[label].logps, losses)
            if exact:
                fp32 = [traces.pop(label) for label in exact]
                verdict = parity.judge(*fp32, traces.pop(OURS), traces, self.contest.fair)
            else:
                truth, ours = traces.pop(self.contest.truth), traces.pop(OURS)
                verdict = parity.judge(truth, ours, peers_fp32=traces)
            goes_on = verdict["passed"] or bounds.whatever
            rounds = self._rounds(workers, bounds) if goes_on else {}
        return Outcome(
            parity=verdict,
            rounds=rounds,
            flops={peer: self._flops(peer, each) for peer, each in rounds.items()},
            ceiling=bounds.ceiling
            or max(ceiling, matmul_ceiling(self.options.device, dtype=dtype)),
            examples_per_turn=self.options.steps * self.options.per_step,
            loaded_bytes={name: workers[name].loaded_bytes for name in timed},
            machine=machine.describe(self.options.device),
        )

    def _exact(self) -> dict[str, Arm]:
        """Return the arms that show what fp32 gives, where those that are timed do not."""
        true = next(arm for arm in self.contest.peers if arm.name == self.contest.truth)
        return {
            f"{arm.name} in fp32": replace(arm.in_precision("32-true"), checkpointing=False)
            for arm in (true, self.contest.ours)
        }

    def _rounds(self, workers: Mapping[str, Worker], bounds: Bounds) -> dict[str, list[Round]]:
        rounds: dict[str, list[Round]] = {peer.name: [] for peer in self.contest.peers}
        for number, turns in enumerate(self.plan.rounds):
            if number and time.monotonic() > bounds.deadline:
                break
            taken: dict[tuple[str, str], Taken] = {}
            for turn in turns:
                status = f"round {number + 1} of {len(self.plan.rounds)}: {turn.arm}"
                with self.console.status(status):
                    steps = self.lead_in + len(turn.steps)
                    taken[turn.arm, turn.peer] = workers[turn.arm].take(steps)
            for turn in turns:
                if turn.arm == turn.peer:
                    each = Round(taken[turn.arm, turn.arm], taken[OURS, turn.arm], turn.steps)
                    rounds[turn.arm].append(each)
                    self.console.print(
                        f"round {number + 1}: {turn.arm} {each.peer.seconds:.2f} s, "
                        f"alignkit {each.ours.seconds:.2f} s",
                        style="dim",
                        highlight=False,
                    )
            bounds.tell(number, {peer: each[-1] for peer, each in rounds.items()})
        return rounds

    def _deal(self, per_parity_step: int) -> tuple[list[Example], Plan]:
        options, task = self.options, self.contest.task
        sizes = {
            "rounds": options.rounds,
            "steps": options.steps,
            "per_step": options.per_step,
            "parity_steps": options.parity_steps,
            "per_parity_step": per_parity_step,
        }
        found = sources.draw(
            task,
            examples_needed(**sizes),
            options,
            self.shared.tokenizer,
            self.shared.config.vocab_size,
            options.tokens,
        )
        return found, make_plan(self.contest.peers, found, seed=options.seed, **sizes)

    def _start(self, label: str, arm: Arm, parity_alone: bool) -> Worker:
        steps = list(self.plan.parity)
        for turn in [] if parity_alone else self.plan.of(arm.name):
            steps += turn.steps[:1] * self.lead_in + turn.steps
        adapter = self.shared.adapter
        if arm.name == self.options.perturb:
            adapter = perturbed_adapter(self.shared, self.work, self.options.seed)
        job = Job(
            arm=arm,
            task=self.contest.task,
            model=self.shared.model,
            tokenizer=self.shared.tokenizer,
            adapter=adapter,
            lora=self.shared.lora.to_dict(),
            examples=self.path,
            scored=[i for step in self.plan.parity for i in step] if arm.adapters else [],
            steps=steps,
            micro_batches=self.micro_batches[arm.package],
            device=self.options.device,
            lead_in=self.lead_in,
        )
        return Worker(job, self.work / f"{label}.log")

    def _flops(self, peer: str, rounds: Sequence[Round]) -> list[tuple[float, float]]:
        model = empty_model(self.shared.config)
        adapters = trainable_parameter_count(inject_lora(model, self.shared.lora))
        costs = Costs.of(empty_model(self.shared.config), adapters)
        full = not next(arm for arm in self.contest.peers if arm.name == peer).adapters

        def of(steps: list[list[int]], full: bool) -> float:
            members = [self.examples[index] for step in steps for index in step]
            return step_flops(costs, members, reference=self.contest.task == "dpo", full=full)

        return [(of(each.steps, False), of(each.steps, full)) for each in rounds]
