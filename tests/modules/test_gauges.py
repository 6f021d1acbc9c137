"""Gauges of held-out pairs, each against plain numpy, and the warning about falling answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.engine import Example, collate, response_lengths
from alignkit.modules import DPOModule
from alignkit.modules.gauges import GAUGES, RatedPairs
from alignkit.modules.pair_scores import pair_scores
from alignkit.modules.watch import FallingChosen, PairWatch
from alignkit.objectives.preference import DPO, PairScores, SimPO
from tests.modules.helpers import loader, pairs, trainer


def rated(rows: list[tuple]) -> RatedPairs:
    """Pairs of (log π_w, log π_l, log ref_w, log ref_l, |y_w|, |y_l|) with rewards at β = ½."""
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    a, b, c, d, chosen_tokens, rejected_tokens = columns
    policy = PairScores(a, b, chosen_tokens, rejected_tokens)
    reference = PairScores(c, d, chosen_tokens, rejected_tokens)
    return RatedPairs(policy, reference, *DPO(0.5).rewards(policy, reference))


def by_numpy(rows: list[tuple]) -> dict[str, float]:
    """Every gauge by its definition."""
    a, b, c, d, x, y = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    chosen, rejected = 0.5 * (a - c), 0.5 * (b - d)
    margin = chosen - rejected
    credit = np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
    alike = np.minimum(x, y) >= 0.8 * np.maximum(x, y)
    ratios = np.concatenate((a - c, b - d))
    probability = 1 / (1 + np.exp(-np.abs(margin)))
    error, edges = 0.0, np.linspace(0.5, 1, 11)
    for low, high in pairwise(edges):
        inside = (probability >= low) & ((probability < high) | (high == 1))
        if inside.any():
            gap = probability[inside].mean() - credit[inside].mean()
            error += inside.mean() * abs(gap)
    rewards, lengths = np.concatenate((chosen, rejected)), np.concatenate((x, y))
    count = len(rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "rewards/accuracies": credit.mean(),
            "accuracy_se": credit.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan,
            "accuracy_like_length": credit[alike].mean() if alike.any() else np.nan,
            "kl": (ratios**2 / 2).mean(),
            "displacement": (a < c).mean(),
            "reward_length_correlation": np.corrcoef(rewards, lengths)[0, 1],
            "calibration_error": error,
        }


ROWS = [
    (-10.0, -20.0, -12.0, -19.0, 10, 12),  # right, of like length
    (-15.0, -9.0, -14.0, -12.0, 30, 5),  # wrong, and the chosen one fell
    (-8.0, -8.0, -8.0, -8.0, 4, 9),  # a tie
    (-40.0, -70.0, -39.0, -50.0, 50, 45),  # right, and both fell
    (-33.0, -31.0, -35.0, -30.5, 7, 7),
]


def test_by_hand() -> None:
    """m = ½(2 + 1), ½(−1 − 3), 0, ½(−1 + 20), ½(2 + ½): three right, one tie of five."""
    pairs_ = rated(ROWS)
    assert pairs_.credit.tolist() == [1, 0, 0.5, 1, 1]
    assert pairs_.alike.tolist() == [True, False, False, True, True]
    values = {name: kind() for name, kind in GAUGES.items()}
    for gauge in values.values():
        gauge.update(pairs_)
    assert pairs_.sums()["rewards/accuracies"] == 3.5
    assert values["accuracy_like_length"].compute().item() == 1
    assert values["displacement"].compute().item() == pytest.approx(0.4)
    squares = 4 + 1 + 1 + 9 + 0 + 0 + 1 + 400 + 4 + 0.25
    assert values["kl"].compute().item() == pytest.approx(squares / 20)


LOGP = st.integers(-360, 0).map(lambda n: n / 4)  # whose differences fp32 holds
ROW = st.tuples(LOGP, LOGP, LOGP, LOGP, st.integers(1, 60), st.integers(1, 60))


@given(st.lists(ROW, min_size=1, max_size=30), st.integers(0, 29))
@settings(max_examples=60, deadline=None)
def test_each_against_numpy_however_pairs_are_batched(rows: list[tuple], cut: int) -> None:
    expected = by_numpy(rows)
    for name, kind in GAUGES.items():
        gauge = kind().to(torch.bfloat16)  # sums stay in float64
        for part in (rows[:cut], rows[cut:]):
            if part:
                gauge.update(rated(part))
        # An interval's end may fall to either side of it.
        tolerance = 1e-3 if name == "calibration_error" else 1e-5
        got = gauge.compute().item()
        if name == "reward_length_correlation" and not abs(got) <= 1.001:
            continue  # all rewards or lengths are equal but for rounding
        np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=tolerance, err_msg=name)


def test_a_validation_logs_them_beside_what_trl_logs(model_dir: Callable, tmp_path: Path) -> None:
    """Against numpy on the scores of the trained policy, over batches of other sizes."""
    module = DPOModule(
        str(model_dir("gpt2")),
        loss=DPO(beta=0.5),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        schedule="constant_with_warmup",
    )
    held_out = pairs(11, seed=4)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, loader(pairs(8), 2), loader(held_out, 4))
    whole = collate(held_out)
    with torch.no_grad():
        policy = pair_scores(module.model.eval(), whole)
        sums = module.reference.sums(whole)
    reference = PairScores.from_responses(sums, response_lengths(whole))
    rows = list(
        zip(
            policy.chosen.tolist(), policy.rejected.tolist(),
            reference.chosen.tolist(), reference.rejected.tolist(),
            policy.chosen_tokens.tolist(), policy.rejected_tokens.tolist(),
            strict=True,
        )
    )  # fmt: skip
    logged = run.callback_metrics
    for name, value in by_numpy(rows).items():
        assert logged[f"val/{name}"].item() == pytest.approx(value, abs=2e-4, nan_ok=True), name
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert f"val/{name}" in logged
    assert not any(name.startswith("train/kl") for name in logged)
    assert not any("gauges" in name for name in module.state_dict())
    tested = run.test(module, loader(held_out, 3), verbose=False)[0]
    name = "rewards/accuracies"
    assert tested[f"test/{name}"] == logged[f"val/{name}"].item()
    assert "val/accuracy" not in logged  # one number under one name


@pytest.mark.parametrize("name", [*GAUGES])
def test_a_policy_that_is_lost_is_not_a_number(name: str) -> None:
    """A NaN is neither a tie nor the first bin, and no error of an index."""
    gauge = GAUGES[name]()
    gauge.update(rated([(nan, -50.0, -50.0, -50.0, 9, 9), (-40.0, -50.0, -50.0, -49.0, 9, 8)]))
    assert gauge.compute().isnan()
    apart = rated([(nan, -5.0, -5.0, -5.0, 90, 9), (-4.0, -5.0, -5.0, -4.9, 9, 9)])
    assert apart.sums()["rewards/accuracies"].isnan()
    if name == "accuracy_like_length":  # of pairs that the NaN is none of
        gauge.reset()
        gauge.update(apart)
        assert gauge.compute() == 1


def test_a_loss_without_a_reference_has_the_gauges_that_need_none(
    model_dir: Callable, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.validate(
        DPOModule(str(model_dir("gpt2")), loss=SimPO()), loader(pairs(6), 3), verbose=False
    )
    assert {"val/accuracy_se", "val/calibration_error"} <= run.callback_metrics.keys()
    assert not {"val/kl", "val/displacement"} & run.callback_metrics.keys()


def moved(chosen: float, rejected: float, count: int = 8) -> RatedPairs:
    """Pairs whose answers moved by so many nats from the reference's −50, a little apart."""
    rows = [(-50 + chosen + 0.01 * i, -50 + rejected, -50.0, -50.0, 9, 9) for i in range(count)]
    return rated(rows)


@pytest.mark.parametrize(
    ("chosen", "rejected", "warns"),
    [(-2.0, -9.0, True), (2.0, -9.0, False), (-9.0, -2.0, False), (0.0, 0.0, False)],
)
def test_falling_chosen_answers_are_told_once(
    chosen: float, rejected: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = FallingChosen(compares=True)
    for _ in range(3):
        watch.add(moved(chosen, rejected), training=True)
        watch.check()
    assert caplog.text.count("chosen answers become less likely") == int(warns)


def test_noise_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """A mean of −0.1 that is 0.2 uncertain says nothing."""
    watch = FallingChosen(compares=True)
    for chosen in (-3.1, 2.9):
        watch.add(moved(chosen, -20.0), training=True)
    watch.check()
    assert not caplog.text


def test_without_a_reference_validations_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    watch = FallingChosen(compares=False)
    for chosen in (0.0, -1.0):
        watch.add(moved(chosen, 4 * chosen), training=False)
        watch.check()
    assert caplog.text.count("chosen answers become less likely (by 1 nats") == 1


def test_noise_between_validations_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each pair is held against itself: half of them rise by 2.9 and half fall by 3.1."""
    watch = FallingChosen(compares=False)
    watch.add(moved(0.0, 0.0, count=16), training=False)
    watch.check()
    for chosen in (-3.1, 2.9):
        watch.add(moved(chosen, -20.0), training=False)
    watch.check()
    assert not caplog.text


def test_the_sanity_check_is_no_validation(
    model_dir: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a learning rate of 0 nothing falls, though the first rows are the shortest."""
    held_out = sorted(pairs(24), key=lambda each: sum(map(len, each.responses)))
    module = DPOModule(
        str(model_dir("gpt2")),
        loss=SimPO(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        schedule="constant_with_warmup",
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    run.fit(module, loader(pairs(8), 4), loader(held_out, 4))
    assert module.watch.falling._first.shape == (2, 24)
    assert "less likely" not in caplog.text


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_training_that_pushes_both_down_is_told(
    micro_batches: int, model_dir: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All rejected answers are one text, and the chosen ones share most of it: both fall.

    It is told of the whole step: a micro-batch of two pairs has too few for a standard error.
    """
    shared = list(range(10, 40))
    rows = [Example([5, n], [[*shared, 50 + n], [*shared, 99]]) for n in range(8)]
    module = DPOModule(
        str(model_dir("gpt2")),
        loss=SinkBoth(beta=0.5),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.02),
        schedule="constant_with_warmup",
    )
    steps = {"accumulate_grad_batches": micro_batches, "log_every_n_steps": 1}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, max_epochs=10, **steps).fit(module, loader(rows, 8 // micro_batches))
    assert caplog.text.count("chosen answers become less likely") == 1
    assert "of 8 pairs" in caplog.text


class SinkBoth(DPO):
    """A loss that is lowered by making both answers less likely, the rejected one more."""

    def __call__(self, policy: PairScores, reference: PairScores) -> torch.Tensor:
        return policy.chosen + 3 * policy.rejected


def test_watching_leaves_training_alone() -> None:
    """Gauges are fed outside of training alone."""
    watch = PairWatch(compares=True)
    watch.add(rated(ROWS), training=True)
    assert all(gauge.sums.sum() == 0 for gauge in watch.named().values())
