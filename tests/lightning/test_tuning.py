"""Lightning's tuners: they find something, and leave everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.callbacks.batch_size_finder import BatchSizeFinder
from lightning.pytorch.callbacks.lr_finder import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from alignkit.errors import AlignkitError
from alignkit.modules.tuning import learning_rate, with_learning_rate
from tests.lightning.helpers import Run, same

pytestmark = pytest.mark.filterwarnings("ignore:.*Argument to .*tqdm")

SEARCH: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 1.0}


class Rates(Callback):
    """The learning rate of every step after the search."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_lr_find_finds_and_leaves_no_trace(run: Callable[..., Run], workplace: Path) -> None:
    tuned = run(max_epochs=20)
    before = tuned.weights
    assert tuned.module.lr == 1e-2
    found = Tuner(tuned.trainer).lr_find(
        tuned.module, datamodule=tuned.data, num_training=24, **SEARCH
    )
    assert found is not None
    rate = found.suggestion()
    assert rate is not None
    assert 1e-4 < rate < 1.0
    assert tuned.module.lr == rate
    assert same(tuned.weights, before)
    assert found.results["loss"][0] < 1  # a mean: the sum over a batch is ten times that
    assert not list(workplace.rglob(".lr_find*"))

    # What follows is a run with this rate, to the bit.
    tuned.losses.clear()
    tuned.trainer = run().trainer
    tuned.fit()
    other = run()
    other.module.lr = rate
    other.fit()
    assert tuned.losses == other.losses
    assert same(tuned.weights, other.weights)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_finder_as_a_callback_trains_with_what_it_found(
    run: Callable[..., Run], schedule: str
) -> None:
    """From the first step on, and through the whole schedule."""
    finder, rates = LearningRateFinder(num_training_steps=6, **SEARCH), Rates()
    finder.lr_find = lambda trainer, module: None  # type: ignore[method-assign, assignment]
    tuned = run(callbacks=[finder, rates], module={"schedule": schedule})
    original = LearningRateFinder.lr_find

    def find(trainer: Any, module: Any) -> None:
        original(finder, trainer, module)
        module.lr = 0.004  # six steps suggest nothing
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.004  # as Lightning does, whatever the warm-up

    finder.lr_find = find  # type: ignore[method-assign, assignment]
    tuned.fit()
    expected = Rates()
    other = run(callbacks=[expected], module={"schedule": schedule})
    other.module.lr = 0.004
    other.fit()
    assert rates.seen == expected.seen
    assert rates.seen[0] == 0.004
    assert tuned.losses[-6:] == other.losses
    assert same(tuned.weights, other.weights)


def test_a_found_rate_keeps_the_ratio_of_lora_plus() -> None:
    from torch import nn

    made = with_learning_rate(lambda p: torch.optim.AdamW(p, lr=1.0), 0.01)
    again = with_learning_rate(made, 0.5)
    assert learning_rate(again) == 0.5
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 8.0},
        {"params": [nn.Parameter(torch.zeros(1))]},
    ]
    assert [g["lr"] for g in again(groups).param_groups] == [0.5, 8.0, 0.5]


def test_one_rate_for_all_is_not_searched_with_lora_plus(run: Callable[..., Run]) -> None:
    tuned = run(callbacks=[LearningRateFinder()], module={"lora_plus_ratio": 4.0})
    with pytest.raises(AlignkitError, match=r"^LearningRateFinder: .*set model.lora_plus_ratio"):
        tuned.fit()


class Rateless(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        del self.defaults["lr"]


def test_an_optimizer_without_a_rate_says_so(run: Callable[..., Run]) -> None:
    with pytest.raises(AlignkitError, match="Rateless has no learning rate"):
        _ = run(module={"optimizer": Rateless}).module.lr


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_scale_batch_size_scales_the_token_budget(
    run: Callable[..., Run], workplace: Path, mode: str
) -> None:
    """Past the number of examples, which Lightning takes for a limit: there are 20."""
    tuned = run(data={"tokens_per_batch": 400})
    before = tuned.weights
    rows: list[int] = []
    keep = tuned.module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        rows.append(batch.num_tokens)
        if batch.num_tokens > 700:
            raise RuntimeError("CUDA out of memory.")
        return keep(batch, batch_idx)

    tuned.module.training_step = training_step  # type: ignore[method-assign]
    found = Tuner(tuned.trainer).scale_batch_size(
        tuned.module, datamodule=tuned.data, batch_arg_name="tokens_per_batch", init_val=100,
        max_trials=6, mode=mode, steps_per_trial=1,
    )  # fmt: skip
    assert found is not None
    assert 300 < found < 800
    assert tuned.data.tokens_per_batch == found
    assert max(rows) > 700
    assert same(tuned.weights, before)
    assert not list(workplace.rglob(".scale_batch*"))
    tuned.module.training_step = keep  # type: ignore[method-assign]
    tuned.trainer = run().trainer
    tuned.fit()
    assert max(batch.num_tokens for batch in tuned.data.train_dataloader()) <= found
    assert len(tuned.data.train_dataloader().dataset) > 0  # type: ignore[arg-type]


def test_the_finder_as_a_callback_goes_on_with_its_budget(run: Callable[..., Run]) -> None:
    """Sampler and schedule are those of a run that had the budget from the start."""
    finder = BatchSizeFinder(
        batch_arg_name="tokens_per_batch", init_val=350, max_trials=2, steps_per_trial=1
    )
    tuned = run(callbacks=[finder], data={"tokens_per_batch": 9000}).fit()
    assert tuned.data.tokens_per_batch == finder.optimal_batch_size == 700
    expected = run(data={"tokens_per_batch": 700}).fit()
    assert tuned.losses[-len(expected.losses) :] == expected.losses
    assert same(tuned.weights, expected.weights)


def test_a_batch_has_no_number_of_examples(run: Callable[..., Run]) -> None:
    tuned = run(callbacks=[BatchSizeFinder()])
    with pytest.raises(AlignkitError, match="batch_arg_name 'tokens_per_batch'"):
        tuned.fit()


@pytest.mark.parametrize(
    "tuner", [LearningRateFinder(), BatchSizeFinder(batch_arg_name="tokens_per_batch")]
)
def test_a_resumed_run_is_not_tuned(
    run: Callable[..., Run], workplace: Path, tuner: Callback
) -> None:
    """It would forget what it resumes."""
    first = run(max_epochs=1).fit()
    first.trainer.save_checkpoint(workplace / "first.ckpt")
    with pytest.raises(AlignkitError, match=rf"^{type(tuner).__name__}: a resumed run"):
        run(callbacks=[tuner]).fit(workplace / "first.ckpt")


def test_tuning_beside_other_callbacks_leaves_them_alone(
    run: Callable[..., Run], workplace: Path
) -> None:
    count: list[int] = []
    keep = LambdaCallback(on_train_batch_end=lambda *_: count.append(1))
    keeper = ModelCheckpoint(workplace / "kept", every_n_train_steps=3, save_top_k=-1)
    tuned = run(callbacks=[keep, keeper], enable_checkpointing=True, max_epochs=20)
    Tuner(tuned.trainer).lr_find(tuned.module, datamodule=tuned.data, num_training=4, **SEARCH)
    assert not count
    assert not list(workplace.rglob("*.ckpt"))
