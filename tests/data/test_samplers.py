"""What the sampler promises, over random lengths, ranks and budgets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data import TokenBudgetBatchSampler
from alignkit.errors import AlignkitError


def ranks(lengths: Any, budget: int, world: int, epoch: int = 0, **options: Any) -> list[Any]:
    """Every rank's batches of an epoch."""
    result = []
    for rank in range(world):
        sampler = TokenBudgetBatchSampler(lengths, budget, rank=rank, world_size=world, **options)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        result.append(batches)
    return result


LENGTHS = st.lists(st.integers(1, 120), min_size=4, max_size=80)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    budget=st.integers(50, 300),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_training(
    lengths: list[int], budget: int, world: int, accumulate: int, epoch: int, seed: int
) -> None:
    """Equal counts, no empty batch, the budget kept, nothing twice, next to nothing left out."""
    all_ranks = ranks(lengths, budget, world, epoch, accumulate=accumulate, seed=seed)
    assert len({len(batches) for batches in all_ranks}) == 1
    flat = [batch for batches in all_ranks for batch in batches]
    assert all(flat)
    assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for batch in flat)
    seen = list(itertools.chain.from_iterable(flat))
    assert len(seen) == len(set(seen))
    assert len(lengths) - len(seen) < world
    first = ranks(lengths, budget, world, 0, accumulate=accumulate, seed=seed)
    assert len(first[0]) == len(all_ranks[0]), "Lightning asks for the length once"


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(50, 300), world=st.integers(1, 4))
def test_evaluation_shows_every_example_once(lengths: list[int], budget: int, world: int) -> None:
    all_ranks = ranks(lengths, budget, world, shuffle=False, equal=False)
    seen = [i for batches in all_ranks for batch in batches for i in batch]
    assert sorted(seen) == list(range(len(lengths)))
    counts = [len(batches) for batches in all_ranks]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    extra=st.integers(0, 5),
)
def test_fixed_examples_per_step(
    lengths: list[int], world: int, accumulate: int, extra: int
) -> None:
    size = world * accumulate + extra
    all_ranks = ranks(lengths, 10, world, accumulate=accumulate, examples_per_batch=size)
    per_step = [
        sum(len(batches[i]) for batches in all_ranks for i in range(at, at + accumulate))
        for at in range(0, len(all_ranks[0]) // accumulate * accumulate, accumulate)
    ]
    whole = len(lengths) // size
    assert per_step[:whole] == [size] * whole
    seen = [i for batches in all_ranks for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) and len(lengths) - len(seen) < world


def test_an_order_that_no_draw_evens_out_is_not_the_first_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that fill a micro-batch beside rows that do not: the last step's number varies."""
    monkeypatch.setattr("alignkit.data.deal.plan._ATTEMPTS", 1)
    lengths = [100, 100, 60, 60, 60, 45, 45, 45, 45, 10] * 4
    for seed in range(20):
        first, *others = (
            ranks(lengths, 100, 1, epoch, accumulate=7, seed=seed)[0] for epoch in range(4)
        )
        for other in others:
            assert len(other) == len(first)
            assert other != first
            assert sorted(itertools.chain(*other)) == list(range(len(lengths)))


def test_longest_first_to_the_lightest_by_hand() -> None:
    """Lengths 5 4 3 3 3 over two ranks: 5+3 and 4+3+3 (Graham's rule), not 5+3+3 and 4+3."""
    all_ranks = ranks([3, 5, 3, 4, 3], 100, 2, shuffle=False)
    loads = [[[3, 5, 3, 4, 3][i] for i in batch] for batches in all_ranks for batch in batches]
    assert loads == [[5, 3], [4, 3, 3]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 60))
    options: dict[str, Any] = {"tokens_per_batch": 200, "seed": 1}
    sampler = TokenBudgetBatchSampler(lengths, **options)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    fresh = TokenBudgetBatchSampler(lengths, **options)
    fresh.set_epoch(1)
    assert list(fresh) == second
    assert list(TokenBudgetBatchSampler(lengths, tokens_per_batch=200, seed=2)) != first


def test_budget_is_used() -> None:
    """Greedy filling leaves about half an example a batch."""
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    batches = list(TokenBudgetBatchSampler(lengths, 4096))
    used = sum(int(lengths[batch].sum()) for batch in batches) / (4096 * len(batches))
    assert used > 0.96
    shared = ranks(lengths, 4096, 8)
    used = int(lengths.sum()) / (4096 * 8 * len(shared[0]))
    assert used > 0.96
    loads = np.array([[lengths[batch].sum() for batch in batches] for batches in shared])
    assert ((loads.max(0) - loads.min(0))[:-1] <= 120).all(), "ranks do equal work"


def test_start_offset_is_where_training_stopped() -> None:
    sampler = TokenBudgetBatchSampler(list(range(1, 60)), 100, seed=3, accumulate=2)
    whole = list(sampler)
    for start in range(len(whole) + 1):
        again = TokenBudgetBatchSampler(list(range(1, 60)), 100, seed=3, accumulate=2)
        again.load_state_dict({"epoch": 0, "batches": start, "plan": sampler.fingerprint})
        if start < len(whole):
            assert list(again) == whole[start:]
            assert again.state_dict()["batches"] == len(whole)
        assert len(again) == len(whole)
        again.set_epoch(1)
        assert len(list(again)) == len(whole)


def test_another_plan_cannot_resume_mid_epoch() -> None:
    state = {"epoch": 0, "batches": 2, "plan": TokenBudgetBatchSampler([9] * 50, 50).fingerprint}
    other = TokenBudgetBatchSampler([9] * 50, 60)
    with pytest.raises(AlignkitError, match="resuming mid-epoch needs the same data and batches"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "batches": 0})  # between epochs anything may change


def test_quotas_draw_anew_each_epoch() -> None:
    """Of 30 and 60 examples an epoch draws 30 and 20."""
    sampler = TokenBudgetBatchSampler([1] * 90, 10, quotas=[(30, 30), (60, 20)])
    seen: set[int] = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        drawn = [i for batch in sampler for i in batch]
        assert sum(i < 30 for i in drawn) == 30 and sum(i >= 30 for i in drawn) == 20
        assert len(set(drawn)) == 50
        seen |= set(drawn)
    assert len(seen) > 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3], "world_size": 2}, "1 examples cannot be dealt to 2 ranks"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0"),
        ({"examples_per_batch": 3, "world_size": 2, "accumulate": 2}, "give at least 4"),
    ],
)
def test_senseless_arguments(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"lengths": [3, 4, 5], "tokens_per_batch": 10, **arguments}
    with pytest.raises(AlignkitError, match=message):
        TokenBudgetBatchSampler(**options)
