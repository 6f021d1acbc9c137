"""The numbers behind the ratios, by hand."""

from __future__ import annotations

import math

import pytest

from alignkit.engine import Example


def test_flops_of_one_pair_by_hand() -> None:
    """Prompt of 3, answers of 2 and 1: T = 6 tokens, N = 3 scored.

    Visible pairs of positions: the prompt's 3·4/2 = 6; the first answer's 2·3 + 2·3/2 = 9; the
    second's 1·3 + 1 = 4; together 19. With 100 body, 10 head and 7 adapter weights and 5 attention
    channels over all layers, forward: body 2·100·6 = 1200, head 2·10·3 = 60, attention
    4·5·19 = 380, adapters 2·7·6 = 84. LoRA: twice body and head, three times the rest,
    2·1260 + 3·464 = 3912; the reference adds one forward, 1724.
    """
    from sidebyside.flops import Costs, step_flops

    costs = Costs(body=100, head=10, attention=5, adapters=7)
    pair = Example([1, 1, 1], [[2, 2], [3]])
    assert step_flops(costs, [pair], reference=False) == 3912
    assert step_flops(costs, [pair], reference=True) == 3912 + 1724
    # Full fine-tuning: 3·1260 + 3·380.
    assert step_flops(costs, [pair], reference=False, full=True) == 4920


def test_costs_are_counted_from_the_model() -> None:
    """GPT-2: 12 layers of 12·768² weights; the head is tied and counted apart."""
    from sidebyside.flops import Costs
    from sidebyside.setup import empty_model
    from sidebyside.shapes import SHAPES

    costs = Costs.of(empty_model(SHAPES["gpt2-shape"]), adapters=0)
    assert costs.body == 12 * 12 * 768**2
    assert costs.head == 50257 * 768
    assert costs.attention == 12 * 768


def test_parity_limits() -> None:
    """fp32 within 1e-3 of the peer; bf16 within two standard errors of the fair peer."""
    from sidebyside.parity import Trace, judge, sampling_slack

    truth = Trace([-10.0, -20.0, -30.0, -40.0], [0.5] * 4)

    def off(by: float) -> Trace:
        return Trace([logp + by for logp in truth.logps], [loss + by for loss in truth.losses])

    assert sampling_slack(4) == 2.0
    peers = {"tuned": off(0.1)}
    assert judge(truth, off(1e-4), off(0.19), peers, "tuned")["passed"]
    assert judge(truth, off(1e-4))["passed"] and not judge(truth, off(0.1))["passed"]
    too_far = judge(truth, off(1e-4), off(0.21), peers, "tuned")
    assert len(too_far["failures"]) == 2  # log-probs and losses
    wrong = judge(truth, off(6e-4), off(0.1), peers, "tuned")
    # Relative: 6e-4 of a log-prob of 10 passes, 6e-4 of a loss of 0.5 does not.
    assert [line.split(":")[0] for line in wrong["failures"]] == ["fp32 losses"]
    # A peer that is far off would make everybody else look good.
    astray = judge(truth, off(1e-4), off(0.1), {**peers, "trl": off(2.1)}, "tuned")
    assert all("trl is off" in line for line in astray["failures"]) and astray["failures"]
    assert not judge(truth, Trace([math.nan] * 4, [0.5] * 4), off(0), peers, "tuned")["passed"]
    assert not judge(truth, Trace(truth.logps, [0.5]), off(0), peers, "tuned")["passed"]


def test_turns_interleave_and_share_their_steps() -> None:
    """A B B C, then backwards; what is compared went through the same examples."""
    from sidebyside.job import Arm
    from sidebyside.plan import OURS, examples_needed, make_plan

    peers = (Arm("trl", "trl"), Arm("trl_tuned", "trl", by_length=True))
    sizes = {"rounds": 4, "steps": 2, "per_step": 3, "parity_steps": 20, "per_parity_step": 2}
    count = examples_needed(**sizes)
    examples = [Example([1] * (1 + i * 7 % 50), [[2], [3] * (1 + i % 5)]) for i in range(count)]
    plan = make_plan(peers, examples, **sizes, seed=0)
    order = [turn.arm for turns in plan.rounds[:2] for turn in turns]
    forward = ["trl", OURS, OURS, "trl_tuned"]
    assert order == forward + forward[::-1]
    for turns in plan.rounds:
        for turn in turns:
            twin = next(t for t in turns if t.arm == OURS and t.peer == turn.peer)
            assert turn.steps == twin.steps
    timed = {i for turn in plan.of("trl") for step in turn.steps for i in step}
    by_length = [step for turn in plan.of("trl_tuned") for step in turn.steps]
    assert timed == {i for step in by_length for i in step} == set(range(24))
    # Batches of like length: together they pad less than random ones do.
    lengths = [len(e.prompt) + max(map(len, e.responses)) for e in examples]

    def padded(steps: list[list[int]]) -> int:
        return sum(3 * max(lengths[i] for i in step) for step in steps)

    assert padded(by_length) < padded([s for turn in plan.of("trl") for s in turn.steps])
    assert len(plan.parity) == 20 and not timed & {i for step in plan.parity for i in step}


def test_synthetic_lengths_are_those_of_hh_rlhf() -> None:
    """Means of the real pairs: prompt 118, chosen 42, rejected 52, within 10 %."""
    from sidebyside.examples import MAX_LENGTH, padded_length, synthetic

    pairs = synthetic("dpo", 4000, vocabulary=100, tokens=0, seed=0)
    means = [
        sum(len(pair.prompt) for pair in pairs) / 4000,
        *(sum(len(pair.responses[side]) for pair in pairs) / 4000 for side in (0, 1)),
    ]
    assert means == pytest.approx([118, 42, 52], rel=0.1)
    assert max(map(padded_length, pairs)) <= MAX_LENGTH


def test_an_adapter_is_non_zero_and_the_perturbed_one_differs_in_b(tmp_path: object) -> None:
    from pathlib import Path

    from safetensors.torch import load_file
    from sidebyside.setup import write_adapter
    from sidebyside.shapes import SHAPES, targets_of

    from alignkit.lora import LoRAConfig

    config = SHAPES["tiny-gpt2-shape"]
    lora = LoRAConfig(targets=targets_of(config))
    found = []
    for noise in (0.0, 0.2):
        directory = Path(str(tmp_path)) / str(noise)
        write_adapter(config, lora, directory, seed=0, noise=noise)
        found.append(load_file(directory / "adapter_model.safetensors"))
    for name, value in found[0].items():
        assert value.abs().min() >= 0 and value.std() > 0.01
        assert value.equal(found[1][name]) == ("lora_A" in name)


def test_only_alignkit_trains_with_its_limit_on_compiled_products() -> None:
    """Every worker imports alignkit, but a peer's keeps PyTorch's."""
    from sidebyside.job import Arm
    from sidebyside.runner import environment

    from alignkit.engine.onednn import LIMITS, PRODUCTS

    ours, theirs = (environment(Arm("arm", package)) for package in ("alignkit", "trl"))
    assert [ours[name] for name in LIMITS] == [str(PRODUCTS)] * 2
    assert [theirs[name] for name in LIMITS] == ["1024"] * 2
