"""A whole comparison: prepare, check parity, let the arms train in turns, sum up."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    PARITY_STEPS,
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


def compare(contest: Contest, options: Options, console: Console) -> Outcome:
    """Run a contest.

    Raises:
        AlignkitError: Something the user named is missing or bad, or an arm failed.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as directory:
        return _Comparison(contest, options, console, Path(directory)).run()


class _Comparison:
    def __init__(self, contest: Contest, options: Options, console: Console, work: Path) -> None:
        self.contest, self.options, self.console, self.work = contest, options, console, work
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
        self.micro_batches = {
            arm.name: our_batches if arm.package == "alignkit" else peer_batches
            for arm in (contest.ours, *contest.peers)
        }
        self.lead_in = int(options.device == "cuda")
        # The full fine-tuning arm trains another model, and so has no part in parity.
        self.in_parity = [arm for arm in (contest.ours, *contest.peers) if arm.adapters]

    def run(self) -> Outcome:
        ceiling = matmul_ceiling(self.options.device)
        truth = self._trace_fp32(
            next(a for a in self.contest.peers if a.name == self.contest.truth)
        )
        ours_fp32 = self._trace_fp32(self.contest.ours)
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            traces: dict[str, parity.Trace] = {}
            for arm in (self.contest.ours, *self.contest.peers):
                with self.console.status(f"{arm.name}: loading, {PARITY_STEPS} parity steps"):
                    worker = stack.enter_context(self._start(arm))
                    losses = worker.take(PARITY_STEPS).losses
                workers[arm.name] = worker
                if arm in self.in_parity:
                    traces[arm.name] = parity.Trace(worker.logps, losses)
            ours = traces.pop(OURS)
            verdict = parity.judge(truth, ours_fp32, ours, traces, self.contest.fair)
            rounds = self._rounds(workers) if verdict["passed"] else {}
        return Outcome(
            parity=verdict,
            rounds=rounds,
            flops={peer: self._flops(peer, each) for peer, each in rounds.items()},
            ceiling=max(ceiling, matmul_ceiling(self.options.device)),
            examples_per_turn=self.options.steps * self.options.per_step,
            loaded_bytes={name: worker.loaded_bytes for name, worker in workers.items()},
            machine=machine.describe(self.options.device),
        )

    def _rounds(self, workers: Mapping[str, Worker]) -> dict[str, list[Round]]:
        rounds: dict[str, list[Round]] = {peer.name: [] for peer in self.contest.peers}
        for number, turns in enumerate(self.plan.rounds):
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
        return rounds

    def _deal(self, per_parity_step: int) -> tuple[list[Example], Plan]:
        options, task = self.options, self.contest.task
        sizes = {
            "rounds": options.rounds,
            "steps": options.steps,
            "per_step": options.per_step,
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

    def _trace_fp32(self, arm: Arm) -> parity.Trace:
        exact = replace(arm, dtype="float32", mixed=False, checkpointing=False)
        with (
            self.console.status(f"{arm.name} in fp32: {PARITY_STEPS} parity steps"),
            self._start(exact, parity_alone=True) as worker,
        ):
            return parity.Trace(worker.logps, worker.take(PARITY_STEPS).losses)

    def _start(self, arm: Arm, parity_alone: bool = False) -> Worker:
        steps = list(self.plan.parity)
        if not parity_alone:
            for turn in self.plan.of(arm.name):
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
            micro_batches=self.micro_batches[arm.name],
            device=self.options.device,
            lead_in=self.lead_in,
        )
        return Worker(job, self.work / f"{arm.name}.log")

    def _flops(self, peer: str, rounds: Sequence[Round]) -> list[tuple[float, float]]:
        model = empty_model(self.shared.config)
        adapters = trainable_parameter_count(inject_lora(model, self.shared.lora))
        costs = Costs.of(empty_model(self.shared.config), adapters)
        full = not next(arm for arm in self.contest.peers if arm.name == peer).adapters

        def of(steps: list[list[int]], full: bool) -> float:
            members = [self.examples[index] for step in steps for index in step]
            return step_flops(costs, members, reference=self.contest.task == "dpo", full=full)

        return [(of(each.steps, False), of(each.steps, full)) for each in rounds]
