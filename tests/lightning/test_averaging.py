"""Averages of the weights: over what trains alone, saved, resumed and started from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alignkit.callbacks import Checkpoint
from alignkit.engine import collate, score
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import load_policy, read_checkpoint
from alignkit.modules import DPOModule
from tests.lightning.helpers import Run, same
from tests.modules.helpers import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
]

AVERAGES: dict[str, Callable[[], Any]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "equal": WeightAveraging,
    "multi": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "buffers left": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "SWA": lambda: StochasticWeightAveraging(5e-3, swa_epoch_start=1),
    "SWA with EMA": lambda: StochasticWeightAveraging(
        5e-3, swa_epoch_start=1, avg_fn=lambda mine, theirs, _: 0.9 * mine + 0.1 * theirs
    ),
}


def every_step(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        directory, every_n_train_steps=1, save_top_k=-1, filename="{step}",
        enable_version_counter=False,
    )  # fmt: skip


def last(directory: Path) -> Checkpoint:
    return Checkpoint(dirpath=directory, save_last=True, monitor="val/loss")


def frozen(module: DPOModule) -> dict[str, Tensor]:
    """Everything that training must leave as it is."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return {k: v.detach().clone() for k, v in tensors if not v.requires_grad}


@pytest.mark.parametrize("name", AVERAGES)
def test_the_base_and_the_reference_stay_to_the_bit(run: Callable[..., Run], name: str) -> None:
    """``decay · w + (1 - decay) · w`` is not w."""
    averaged = run(callbacks=[AVERAGES[name]()])
    before = frozen(averaged.module)
    averaged.fit()
    assert same(frozen(averaged.module), before)


@pytest.mark.parametrize("name", ["EMA", "equal", "multi"])
def test_the_average_is_the_average(
    run: Callable[..., Run], plain: Run, workplace: Path, name: str
) -> None:
    """Of the weights after every step; training itself is left alone."""
    averaged = run(
        callbacks=[AVERAGES[name](), every_step(workplace / "steps")], enable_checkpointing=True
    ).fit()
    assert averaged.losses == plain.losses
    history = [
        read_checkpoint(workplace / f"steps/step={step}.ckpt")["current_model_state"]
        for step in range(1, 7)
    ]
    assert same(history[-1], plain.weights)
    for key, value in averaged.weights.items():
        expected = history[0][key].clone()
        for count, weights in enumerate(history[1:], start=1):
            share = 1 / (count + 1) if name == "equal" else 0.1
            expected += share * (weights[key] - expected)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


def test_frozen_weights_are_not_held_twice(run: Callable[..., Run]) -> None:
    for callback in (EMAWeightAveraging(), StochasticWeightAveraging(1e-2)):
        averaged = run(callbacks=[callback]).fit()
        held = callback._average_model
        assert held is not None
        copied = getattr(held, "module", held)
        mine, theirs = dict(copied.named_parameters()), dict(averaged.module.named_parameters())
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (mine[key].data_ptr() == value.data_ptr()) is not value.requires_grad


@pytest.mark.parametrize("name", ["EMA", "SWA"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_resumes_to_the_bit(run: Callable[..., Run], workplace: Path, name: str, step: int) -> None:
    """Within an epoch and between two."""

    def make(directory: Path) -> Run:
        keepers = [every_step(directory / "steps"), last(directory)]
        return run(callbacks=[AVERAGES[name](), *keepers], enable_checkpointing=True, max_epochs=3)

    whole = make(workplace / "whole").fit()
    resumed = make(workplace / "resumed").fit(workplace / f"whole/steps/step={step}.ckpt")
    assert resumed.losses == whole.losses[step:]
    assert same(resumed.weights, whole.weights)
    files = [read_checkpoint(workplace / part / "last.ckpt") for part in ("whole", "resumed")]
    assert same(files[0]["state_dict"], files[1]["state_dict"])


@pytest.mark.parametrize("name", ["EMA", "SWA"])
def test_the_last_file_holds_the_average(
    run: Callable[..., Run], workplace: Path, name: str
) -> None:
    """It starts another stage, and generates, as the module that training left behind."""
    averaged = run(callbacks=[AVERAGES[name](), last(workplace)], enable_checkpointing=True).fit()
    saved = read_checkpoint(workplace / "last.ckpt")["state_dict"]
    assert same(saved, averaged.weights)
    policy, _ = load_policy(str(workplace / "last.ckpt"))
    batch = collate(pairs(3))
    averaged.module.model.eval()
    assert torch.equal(score(policy, batch), score(averaged.module.model, batch))
    again = DPOModule(
        averaged.module.base, lora=averaged.module.lora, init_from=str(workplace / "last.ckpt")
    )
    assert same(again.state_dict(), averaged.weights)


def test_a_run_that_goes_on_goes_on_from_its_own_weights(
    run: Callable[..., Run], workplace: Path
) -> None:
    """EMA: the file written when a run ends, between two validations, holds both."""

    def make(epochs: int, directory: Path) -> Run:
        return run(
            callbacks=[AVERAGES["EMA"](), last(directory)], enable_checkpointing=True,
            max_epochs=epochs, check_val_every_n_epoch=9,
            module={"schedule": "constant_with_warmup"},
        )  # fmt: skip

    whole = make(2, workplace / "whole").fit()
    make(1, workplace / "half").fit()
    resumed = make(2, workplace / "resumed").fit(workplace / "half/last.ckpt")
    assert resumed.losses == whole.losses[3:]
    assert same(resumed.weights, whole.weights)


@pytest.mark.parametrize("name", ["EMA", "SWA"])
def test_an_average_is_not_resumed_as_if_it_had_been_trained(
    run: Callable[..., Run], workplace: Path, name: str
) -> None:
    averaged = run(callbacks=[AVERAGES[name]()]).fit()
    averaged.trainer.save_checkpoint(workplace / "end.ckpt")
    with pytest.raises(AlignkitError, match=r"^ckpt_path: holds the average .*init_from"):
        run(callbacks=[AVERAGES[name]()], max_epochs=3).fit(workplace / "end.ckpt")
    run().trainer.validate(
        averaged.module, averaged.data, ckpt_path=workplace / "end.ckpt", verbose=False
    )


def test_weights_alone_would_not_be_the_average(run: Callable[..., Run], workplace: Path) -> None:
    keeper = ModelCheckpoint(workplace, save_weights_only=True)
    with pytest.raises(AlignkitError, match="save_weights_only would leave the averaged weights"):
        run(callbacks=[AVERAGES["EMA"](), keeper], enable_checkpointing=True).fit()


def test_validation_measures_the_average(run: Callable[..., Run], plain: Run) -> None:
    averaged = run(callbacks=[AVERAGES["EMA"]()]).fit()
    measured = averaged.trainer.callback_metrics["val/loss"]
    (again,) = run().trainer.validate(averaged.module, averaged.data, verbose=False)
    assert measured.item() == pytest.approx(again["val/loss"])
    assert measured.item() != pytest.approx(
        plain.trainer.callback_metrics["val/loss"].item(), rel=1e-3
    )


def test_any_wrapper_sees_what_trains_under_its_own_names(run: Callable[..., Run]) -> None:
    """destination, prefix, keep_vars; and no wrapper calls a child's load_state_dict."""
    module = run().module
    wrapper = torch.nn.ModuleDict({"first": module, "second": torch.nn.Linear(2, 2)})
    state = wrapper.state_dict()
    own = module.state_dict()
    assert own
    assert set(state) == {f"first.{k}" for k in own} | {"second.weight", "second.bias"}
    destination: dict[str, Any] = {"other": torch.zeros(1)}
    returned = module.state_dict(destination=destination, prefix="x.")
    assert returned is destination
    assert set(destination) == {"other"} | {f"x.{k}" for k in own}
    kept = module.state_dict(keep_vars=True)
    assert all(value.requires_grad for value in kept.values())
    assert not any(value.requires_grad for value in own.values())

    changed = {k: torch.full_like(v, 0.25) for k, v in state.items()}
    keys = wrapper.load_state_dict(changed)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert all((value == 0.25).all() for value in module.state_dict().values())
    del changed[next(iter(changed))]
    with pytest.raises(AlignkitError, match="missing"):
        wrapper.load_state_dict(changed)
    average = AveragedModel(module)
    average.update_parameters(module)
    assert {f"module.{k}" for k in own} == set(average.state_dict()) - {"n_averaged"}


def test_a_deep_copy_is_a_copy(run: Callable[..., Run]) -> None:
    """What is done to it, even to what is frozen, is not done to the module."""
    module = run().module
    before = frozen(module)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    copied.to(torch.bfloat16)
    assert same(frozen(module), before)
    assert {k: v.shape for k, v in copied.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
