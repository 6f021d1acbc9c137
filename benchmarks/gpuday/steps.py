"""Whole training steps beside the peers, in their own trainers, on the same examples.

Each task and shape is a contest of `sidebyside`: one process an arm, in interleaved turns. Parity
is judged and noted, and the arms are timed whatever the verdict. Where TRL is not installed, SFT is
held against PEFT in transformers' trainer, and DPO takes its steps alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from statistics import median

import dpo
import lora
import sft
from sidebyside import summary
from sidebyside.experiment import Bounds, Contest, Outcome, Round, compare
from sidebyside.job import Arm, Task
from sidebyside.options import UNITS, Options

from gpuday import bare
from gpuday.clock import interleaved, peak_above
from gpuday.day import Day

_WANTED = {"dpo": dpo.WANTED, "sft": dpo.WANTED, "lm": lora.WANTED}
# Of 64 pairs a step, and of the shorter rows of SFT, one turn of TRL's takes seconds on a GPU.
_PEER_BATCH = 8
# Of eight micro-batches each: twenty took longer than everything that was timed.
_PARITY_STEPS = 4


def measure(day: Day) -> None:
    """Take every contest that has not been taken yet; one that fails leaves the others."""
    late, failed, longest = [], [], 0.0
    for task, shape in day.sizes.contests:
        name = f"{shape} {task}"
        if day.has(f"{name}: whole"):
            continue
        # A contest that would be broken off leaves its rounds and no more.
        if day.is_late() or day.seconds_left() < 0.8 * longest:
            late.append(name)
            continue
        began = time.monotonic()
        contest = contest_of(task)
        if contest is None:
            _alone(day, task, shape, name, "TRL is not installed")
        else:
            try:
                _contest(day, contest, shape, name)
            except Exception as error:
                day.note(f"{name}: error", f"{type(error).__name__}: {error}"[:1000], "")
                failed.append(name)
                bare.free(day)
                _alone(day, task, shape, name, "an arm failed")
                continue
        bare.free(day)
        longest = max(longest, time.monotonic() - began)
        day.note(f"{name}: whole", True, "", seconds=round(time.monotonic() - began, 1))
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")
    if late:
        raise TimeoutError(f"no time was left for {', '.join(late)}")


def contest_of(task: Task) -> Contest | None:
    """Who can be compared with what is installed; ``None`` for nobody."""
    if task == "lm":
        return lora.CONTEST
    if find_spec("trl") is not None and find_spec("datasets") is not None:
        return dpo.CONTEST if task == "dpo" else sft.SFT
    if task == "dpo":
        return None
    peers = (Arm("peft", "peft", dtype="float32"), Arm("peft_bf16", "peft"))
    return replace(sft.SFT, peers=peers, truth="peft", fair="peft_bf16")


def options_of(day: Day, task: Task, shape: str) -> Options:
    """What a contest is told."""
    sizes = day.sizes
    path = day.scratch / "lengths.json"
    path.write_text(json.dumps(day.lengths))
    return Options(
        model=day.model(shape),
        tokenizer=None,
        data=None,
        lengths=str(path),
        rounds=sizes.rounds,
        tokens_per_batch=sizes.row,
        device=day.device,
        precision="bf16-mixed",
        seed=0,
        plot=None,
        json=None,
        per_step=sizes.per_step,
        steps=sizes.steps,
        peer_batch=min(_PEER_BATCH, sizes.per_step),
        tokens=sizes.lm_tokens,
        parity_steps=_PARITY_STEPS,
        perturb=None,
    )


def _contest(day: Day, contest: Contest, shape: str, name: str) -> None:
    options = options_of(day, contest.task, shape)

    def tell(number: int, turns: Mapping[str, Round]) -> None:
        seconds = {
            peer: {"peer": turn.peer.seconds, "alignkit": turn.ours.seconds}
            for peer, turn in turns.items()
        }
        day.note(f"{name}: round {number + 1}", seconds, "s")

    bounds = Bounds(
        deadline=day.deadline,
        whatever=True,
        ceiling=day.ceiling(),
        tell=tell,
    )
    outcome = compare(contest, options, day.console, bounds)
    unit = UNITS[contest.task]
    about = {
        "per_step": options.per_step,
        "peer_batch": options.peer_batch,
        "rows_up_to": options.tokens_per_batch,
        "examples": f"{options.tokens} random tokens"
        if contest.task == "lm"
        else "random tokens in the lengths of real pairs",
    }
    verdict = outcome.parity
    day.note(f"{name}: parity", verdict["passed"], "", steps=options.parity_steps, verdict=verdict)
    for arm, found in summary.arms(outcome, unit).items():
        _note_arm(day, f"{name}: {arm}", found, outcome, unit, about)
    wanted = _WANTED[contest.task] | lora.WANTED  # those whose peer took no part drop out
    for key, value in summary.ratios(outcome, wanted).items():
        day.note(f"{name}: {key}", value, "×", **about)


def _note_arm(
    day: Day,
    label: str,
    found: dict[str, object],
    outcome: Outcome,
    unit: str,
    about: dict[str, object],
) -> None:
    per_second = found[f"{unit}_per_second"]
    rounds = found.get("rounds")
    day.note(f"{label}: {unit}", per_second, f"{unit}/s", rounds=rounds, **about)
    used = found["flop_utilisation"]
    ceiling = outcome.ceiling / 1e12
    day.note(f"{label}: MFU of useful tokens", used, "of the ceiling", ceiling=ceiling, **about)
    peak = found["peak_bytes_above_loaded"]
    day.note(
        f"{label}: peak above the model",
        float(peak) / 2**30,  # type: ignore[arg-type]
        "GiB",
        loaded=float(found["loaded_bytes"]) / 2**30,  # type: ignore[arg-type]
        **about,
    )


def _alone(day: Day, task: Task, shape: str, name: str, peers: str) -> None:
    examples = bare.steps_of(day, task, shape, 2)
    step = bare.Step(bare.build(day, task, shape), bare.batches_of(day, examples))
    step()
    step()
    times = interleaved({name: step}, day.sizes.rounds, 2, day.device, day.is_late)[name]
    flops = sum(bare.flops_of(task, shape, members) for members in examples) / 2
    about = {"per_step": day.sizes.per_step, "trainer": "none", "peers": peers}
    day.note(f"{name}: step alone", median(times), "s", rounds=times, **about)
    used = flops / (median(times) * day.ceiling())
    day.note(f"{name}: MFU of useful tokens", used, "of the ceiling", **about)
    peak = peak_above(step, day.device)
    day.note(f"{name}: peak above the model", peak / 2**30, "GiB", **about)
