"""An epoch goes on with other ranks: the same order, nothing twice, the same steps if they can."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data import TokenBudgetBatchSampler
from alignkit.errors import AlignkitError

Ranks = tuple[int, int]
"""Processes, and micro-batches of a step on each."""


def samplers(lengths: list[int], ranks: Ranks, **options: Any) -> list[TokenBudgetBatchSampler]:
    world, accumulate = ranks
    return [
        TokenBudgetBatchSampler(
            lengths, rank=rank, world_size=world, accumulate=accumulate, **options
        )
        for rank in range(world)
    ]


def steps_of(everyone: list[TokenBudgetBatchSampler], accumulate: int) -> list[list[int]]:
    """What each optimizer step of the rest of the epoch shows, over all ranks."""
    dealt = [list(sampler) for sampler in everyone]
    assert len({len(batches) for batches in dealt}) == 1, "ranks must stay in step"
    assert all(batch for batches in dealt for batch in batches), "no batch may be empty"
    return [
        sorted(i for batches in dealt for batch in batches[at : at + accumulate] for i in batch)
        for at in range(0, len(dealt[0]), accumulate)
    ]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nothing_is_repeated_or_lost_however_often_the_ranks_change(data: Any) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 120), min_size=12, max_size=80))
    fixed = draw(st.sampled_from([None, 12]))
    options = {
        "tokens_per_batch": draw(st.integers(60, 200)),
        "examples_per_batch": fixed,
        "seed": draw(st.integers(0, 3)),
    }
    epoch = draw(st.integers(0, 3))
    # 12 examples a step hold four ranks of up to three micro-batches.
    course = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=4))
    shown: list[list[int]] = []
    position: dict[str, Any] | None = None
    order: list[int] = []
    whole: list[list[int]] = []
    for number, ranks in enumerate(course):
        everyone = samplers(lengths, ranks, **options)
        for sampler in everyone:
            if position is None:
                sampler.set_epoch(epoch)
            else:
                sampler.load_state_dict(position)
        steps = steps_of(everyone, ranks[1])
        one = everyone[0]
        assert len(one) == one._start + len(list(one))
        if position is None:
            whole, order = steps, one._order.tolist()
        if number == len(course) - 1 or len(steps) < 2:
            shown += steps
            break
        # A run may also end before its first step, after a validation that saved.
        taken = draw(st.integers(int(position is None), len(steps) - 1))
        shown += steps[:taken]
        position = {
            "epoch": epoch,
            "batches": one._start + taken * ranks[1],
            "plan": one.fingerprint,
        }
    seen = [i for step in shown for i in step]
    assert len(seen) == len(set(seen)), "nothing is repeated"
    if fixed:
        assert shown[: len(whole) - 1] == whole[:-1], "the same examples in the same steps"
    # In the order's order, of which an epoch may leave out the end.
    place = {example: at for at, example in enumerate(order)}
    places = [sorted(place[i] for i in step) for step in shown]
    assert [at for step in places for at in step] == list(range(len(seen)))
    assert len(lengths) - len(seen) < max(world * accumulate for world, accumulate in course)
    later = samplers(lengths, ranks, **options)
    for sampler, fresh in zip(everyone, later, strict=False):
        sampler.set_epoch(epoch + 1)
        fresh.set_epoch(epoch + 1)
        assert list(sampler) == list(fresh) and len(sampler) == len(fresh), (
            "one epoch alone differs"
        )


@pytest.mark.parametrize("course", [(1, 4, 1), (1, 4, 2), (1, 4, 4), (4, 1, 4), (4, 1, 2, 4)])
@pytest.mark.parametrize("fixed", [8, None])
def test_a_run_that_ends_before_its_first_step_loses_nothing(
    course: tuple[int, ...], fixed: int | None
) -> None:
    """Micro-batches a step change, a validation saves, and they change once more."""
    options = {"tokens_per_batch": 200, "examples_per_batch": fixed}
    position: dict[str, Any] | None = None
    shown: list[list[int]] = []
    for number, accumulate in enumerate(course):
        (sampler,) = samplers([10] * 240, (1, accumulate), **options)
        if position is not None:
            sampler.load_state_dict(position)
        steps = steps_of([sampler], accumulate)
        taken = 1 if number == 0 else len(steps) if number == len(course) - 1 else 0
        shown += steps[:taken]
        batches = sampler._start + taken * accumulate
        position = {"epoch": 0, "batches": batches, "plan": sampler.fingerprint}
    seen = [i for step in shown for i in step]
    assert len(seen) == len(set(seen)) > 236


def test_as_many_micro_batches_over_all_ranks_make_the_same_steps() -> None:
    """Four ranks, or two that take two micro-batches each."""
    lengths = [7 + 13 * i % 90 for i in range(200)]
    options: dict[str, Any] = {"tokens_per_batch": 150}
    four = samplers(lengths, (4, 1), **options)
    whole = steps_of(four, 1)
    two = samplers(lengths, (2, 2), **options)
    for sampler in two:
        sampler.load_state_dict({"epoch": 0, "batches": 3, "plan": four[0].fingerprint})
    assert len(whole) > 8
    assert steps_of(two, 2) == whole[3:]


def test_one_line_says_what_changed(caplog: pytest.LogCaptureFixture) -> None:
    two, three = (
        samplers([9] * 50, (2, 1), tokens_per_batch=45),
        samplers([9] * 50, (3, 2), tokens_per_batch=45),
    )
    with caplog.at_level(logging.INFO, "alignkit"):
        for sampler in three:
            sampler.load_state_dict({"epoch": 0, "batches": 2, "plan": two[0].fingerprint})
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        "resuming mid-epoch with 3 rank(s) instead of 2 and 2 micro-batch(es) a step instead of 1: "
        "after 2 steps, the epoch's other 30 examples come in the same order, in 1 steps"
    )


def test_fewer_examples_than_ranks_are_left_out_as_at_any_epoch_s_end() -> None:
    one = TokenBudgetBatchSampler([10] * 9, 20, shuffle=False)
    four = samplers([10] * 9, (4, 1), tokens_per_batch=20, shuffle=False)
    for sampler in four:
        sampler.load_state_dict({"epoch": 0, "batches": 4, "plan": one.fingerprint})
        assert list(sampler) == [] and len(sampler) == 4
        sampler.set_epoch(1)
        assert len(list(sampler)) == len(sampler) == 2


@pytest.mark.parametrize(
    "other", [{"tokens_per_batch": 60}, {"seed": 1}, {"lengths": [9] * 49 + [8]}]
)
def test_anything_else_stays_refused_on_other_ranks(other: dict[str, Any]) -> None:
    before = TokenBudgetBatchSampler([9] * 50, 45, world_size=2)
    options = {"lengths": [9] * 50, "tokens_per_batch": 45, "world_size": 3, **other}
    after = TokenBudgetBatchSampler(**options)
    with pytest.raises(AlignkitError, match="same data and batches as before") as caught:
        after.load_state_dict({"epoch": 0, "batches": 2, "plan": before.fingerprint})
    assert "world_size" not in str(caught.value)
