"""A resumed run does what its own settings say, from its first step on, and says what is new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam, AdamW

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule, SFTModule
from alignkit.objectives.logistic import DPO
from tests.modules.helpers import answers, loader, logged_steps, pairs, trainer

# Each run writes into a folder of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
CONSTANT = {"schedule": "constant_with_warmup"}


def adamw(**options: Any) -> Callable[[Any], AdamW]:
    return lambda parameters: AdamW(parameters, **{"lr": 1e-3, "weight_decay": 0.0, **options})


class Run:
    """One training run over the same eight answers, one a step."""

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.home = str(base), home
        self.number = 0

    def __call__(
        self,
        *callbacks: L.Callback,
        resume: Path | None = None,
        steps: int = 4,
        kind: type = SFTModule,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[L.LightningModule, dict[str, list[float]], Path]:
        self.number += 1
        directory = self.home / str(self.number)
        torch.manual_seed(0)
        module = kind(self.base, **{"optimizer": adamw(), **CONSTANT, **settings})
        logged = logged_steps(module)
        saver = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1)
        run = trainer(
            directory,
            max_steps=steps,
            callbacks=[saver, *callbacks],
            enable_checkpointing=True,
            **(options or {}),
        )
        examples = pairs(8) if kind is DPOModule else answers(8)
        # A plain loader starts over: leave out what the steps before have had.
        done = 0 if resume is None else torch.load(resume, weights_only=True)["global_step"]
        run.fit(module, loader(examples[done:], 1), ckpt_path=resume, weights_only=True)
        return module, logged, directory / "last.ckpt"


@pytest.fixture
def run(model_dir: Callable[..., Path], tmp_path: Path) -> Run:
    return Run(model_dir("gpt2"), tmp_path)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log has said of changed settings."""
    caplog.set_level(logging.INFO, "alignkit")
    return lambda: [
        record.getMessage().removeprefix("resuming with changed settings: ")
        for record in caplog.records
        if "changed settings" in record.getMessage()
    ]


class SetAt(L.Callback):
    """Changes the optimizer in the middle of a run, as no resume has to."""

    def __init__(self, step: int, **values: Any) -> None:
        self.step, self.values = step, values

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.optimizers[0].param_groups[0].update(self.values)
            if "lr" in self.values:
                trainer.lr_scheduler_configs[0].scheduler.base_lrs = [self.values["lr"]]


def test_nothing_is_said_of_a_run_that_goes_on_as_it_was(
    run: Run, told: Callable[[], list[str]]
) -> None:
    settings = {"schedule": "cosine", "warmup_steps": 2, "lora_plus_ratio": 4.0}
    whole, logged, _ = run(steps=4, **settings)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    _, _, half = run(Stop(), **settings)
    resumed, again, _ = run(resume=half, **settings)
    assert again["train/lr"] == logged["train/lr"][2:]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert not told()


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-2},
        {"weight_decay": 0.3},
        {"betas": (0.5, 0.7)},
        {"eps": 1e-3},
        {"lr": 3e-3, "weight_decay": 0.1},
    ],
)
def test_the_optimizers_settings_hold_from_the_first_resumed_step(
    run: Run, told: Callable[[], list[str]], change: dict[str, Any]
) -> None:
    """As if they had been changed between two steps of one run."""
    expected = run(SetAt(2, **change), steps=4)[0].state_dict()
    half = run(steps=2)[2]
    module, logged, last = run(resume=half, steps=4, optimizer=adamw(**change))
    assert logged["train/lr"][0] == change.get("lr", 1e-3)
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    (line,) = told()
    for name, value in change.items():
        new = list(value) if isinstance(value, tuple) else value
        assert f"model.optimizer.{name} " in line
        assert f" -> {new}" in line
    # And the next resume compares with what was used, not with what was before.
    run(resume=last, steps=5, optimizer=adamw(**change))
    assert told()[1:] == ["trainer.max_steps 4 -> 5; total steps 4 -> 5"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"schedule": "linear"}, {"schedule": "linear"}),
        ({"schedule": "cosine"}, {"schedule": "cosine"}),
        ({"schedule": "linear", "warmup_steps": 0.5}, {"schedule": "linear", "warmup_steps": 0.5}),
        (CONSTANT, {"schedule": "linear"}),
        ({"schedule": "linear"}, CONSTANT),
        (CONSTANT, {"schedule": "cosine", "warmup_steps": 4}),
        ({"schedule": "linear", "lora_plus_ratio": 2.0}, {"schedule": "cosine"}),
    ],
)
def test_a_schedule_goes_on_as_a_run_of_that_length_would(
    run: Run, told: Callable[[], list[str]], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Lengthened from 2 to 4 steps, or of another form: no step of the old one, none of 0."""
    whole = run(steps=4, **after)[1]["train/lr"]
    half = run(steps=2, **before)[2]
    logged = run(resume=half, steps=4, **after)[1]["train/lr"]
    assert logged == whole[2:]
    (line,) = told()
    assert "trainer.max_steps 2 -> 4" in line
    names = [name for name in after if after[name] != before.get(name)]
    assert all(f"model.{name} " in line for name in names)


@pytest.mark.parametrize(("old", "new"), [(1.0, 16.0), (16.0, 1.0), (16.0, 4.0)])
def test_moments_follow_their_parameters_into_other_groups(
    run: Run, told: Callable[[], list[str]], old: float, new: float
) -> None:
    """LoRA+ orders parameters anew: B of every layer moves into a group of its own."""

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            names = {parameter: name for name, parameter in module.named_parameters()}
            self.moments = {
                names[p]: value["exp_avg"].clone() for p, value in optimizer.state.items()
            }
            self.rates = {
                names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]
            }

    half = run(steps=2, lora_plus_ratio=old)[2]
    saved = torch.load(half, weights_only=True)
    names = [name for group in saved["settings"]["parameters"] for name in group]
    expected = {names[i]: v["exp_avg"] for i, v in saved["optimizer_states"][0]["state"].items()}
    look = Look()
    run(look, resume=half, steps=3, lora_plus_ratio=new)
    assert look.moments.keys() == expected.keys()
    assert all(torch.equal(look.moments[name], expected[name]) for name in expected)
    for name, rate in look.rates.items():
        assert rate == pytest.approx(1e-3 * (new if "lora_B" in name else 1))
    assert f"model.lora_plus_ratio {old} -> {new}" in told()[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (adamw(), lambda p: SGD(p, lr=0.1), "state of AdamW, which SGD cannot go on with"),
        (lambda p: SGD(p, lr=0.1), adamw(), "state of SGD, which AdamW cannot go on with"),
        (lambda p: Adam(p, lr=1e-3), adamw(), "state of Adam, which AdamW cannot go on with"),
        (adamw(), adamw(amsgrad=True), r"no max_exp_avg_sq, .*amsgrad False -> True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(run: Run, old: Any, new: Any, message: str) -> None:
    half = run(steps=1, optimizer=old)[2]
    with pytest.raises(AlignkitError, match=f"ckpt_path: .*{message}") as caught:
        run(resume=half, steps=2, optimizer=new)
    assert "\n" not in str(caught.value)


def test_momentum_may_begin(run: Run, told: Callable[[], list[str]]) -> None:
    """SGD without it has kept nothing, so nothing is missing."""
    half = run(steps=1, optimizer=lambda p: SGD(p, lr=0.1))[2]
    run(resume=half, steps=2, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))
    assert "model.optimizer.momentum 0 -> 0.9" in told()[0]


def test_a_checkpoint_of_weights_alone_is_refused(run: Run, tmp_path: Path) -> None:
    last = run(steps=1)[2]
    checkpoint = torch.load(last, weights_only=True)
    for name in ("optimizer_states", "lr_schedulers"):
        del checkpoint[name]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(AlignkitError, match=r"holds weights alone .*pass it as model.init_from"):
        run(resume=tmp_path / "weights.ckpt", steps=2)


def test_a_checkpoint_of_an_earlier_alignkit_obeys_too(
    run: Run, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    """It kept neither the optimizer's class nor names of parameters."""
    checkpoint = torch.load(run(steps=2)[2], weights_only=True)
    for name in ("settings", "position", "epoch_sums", "skipped_steps"):
        del checkpoint[name]
    old = tmp_path / "old.ckpt"
    torch.save(checkpoint, old)
    logged = run(resume=old, steps=4, optimizer=adamw(lr=0.5), schedule="linear")[1]
    assert logged["train/lr"] == [0.25, 0.125]
    assert told() == [
        "model.optimizer.lr 0.001 -> 0.5; model.schedule constant_with_warmup -> linear"
    ]
    with pytest.raises(AlignkitError, match="another optimizer"):
        run(resume=old, steps=4, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))
    with pytest.raises(AlignkitError, match="other groups of parameters"):
        run(resume=old, steps=4, lora_plus_ratio=2.0)


def test_every_other_setting_that_changed_is_told(run: Run, told: Callable[[], list[str]]) -> None:
    """They held before too; a reader should know that the curve has a bend."""
    half = run(steps=2, kind=DPOModule, lora=LoRAConfig(dropout=0.1))[2]
    run(
        resume=half,
        steps=2 + 1,
        kind=DPOModule,
        lora=LoRAConfig(dropout=0.2),
        loss=DPO(beta=0.5),
        options={"gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
    )
    assert told() == [
        "model.lora.dropout 0.1 -> 0.2; model.loss.beta 0.1 -> 0.5; trainer.max_steps 2 -> 3; "
        "trainer.accumulate_grad_batches 1 -> 2; trainer.gradient_clip_val None -> 1.0; "
        "total steps 2 -> 3"
    ]


def test_loading_for_use_is_no_resume(run: Run, told: Callable[[], list[str]]) -> None:
    """A module rebuilt from a checkpoint begins a run of its own."""
    last = run(steps=2)[2]
    module = SFTModule.load_from_checkpoint(last, optimizer=adamw(lr=0.25), **CONSTANT)
    logged = logged_steps(module)
    trainer(run.home, max_steps=1).fit(module, loader(answers(2), 1))
    assert logged["train/lr"] == [0.25]
    assert not told()


def test_fewer_steps_than_were_taken_are_refused(run: Run) -> None:
    """Nothing would be trained, and the run would count as done."""
    _, _, last = run(steps=3)
    with pytest.raises(AlignkitError, match=r"has taken 3 steps, more than trainer.max_steps=2"):
        run(resume=last, steps=2)
    run(resume=last, steps=3)  # is done


@pytest.mark.parametrize("limits", [{"max_epochs": -1}, {"max_time": "00:00:01:00"}])
def test_a_run_without_a_number_of_steps(
    model_dir: Callable[..., Path], tmp_path: Path, limits: dict[str, Any]
) -> None:
    """A constant schedule needs none; what depends on one is refused."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    def fit(**settings: Any) -> list[float]:
        module = SFTModule(str(model_dir("gpt2")), optimizer=adamw(), **settings)
        logged = logged_steps(module)
        run = trainer(tmp_path, callbacks=[Stop()], **limits)
        run.fit(module, loader(answers(8), 1))
        return logged["train/lr"]

    assert fit(**CONSTANT) == [1e-3] * 3
    assert fit(**CONSTANT, warmup_steps=2) == [0.0, 5e-4, 1e-3]
    with pytest.raises(
        AlignkitError, match=r"model.schedule=linear: .*trainer.max_steps.*constant"
    ):
        fit(schedule="linear")
    with pytest.raises(AlignkitError, match=r"model.warmup_steps=0.1: .*trainer.max_steps"):
        fit(**CONSTANT, warmup_steps=0.1)


def test_another_seed_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random state is the checkpoint's: another seed would be taken and change nothing."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    *_, last = run(steps=2)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with pytest.raises(AlignkitError, match=r"seeded with 0 .*seed_everything=7 would change"):
        run(resume=last)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    run(resume=last)
    monkeypatch.delenv("PL_GLOBAL_SEED")  # a run in Python without a seed goes on as before
    run(resume=last)


def test_a_loss_that_a_run_is_measured_by_and_was_not_trained_by_is_told(
    run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """In validation and in test, of the loss alone; nothing where it is the same."""
    last = run(steps=1, kind=DPOModule, loss=DPO(beta=0.3))[2]
    told = "measuring with changed settings: model.loss.beta 0.3 -> 0.1"
    for loss, said in ((DPO(beta=0.3), []), (DPO(), [told])):
        module = DPOModule(run.base, loss=loss, warmup_steps=3)
        measures = trainer(tmp_path)
        for measure in (measures.validate, measures.test):
            caplog.clear()
            with caplog.at_level(logging.INFO, "alignkit"):
                measure(module, loader(pairs(2), 1), ckpt_path=last, verbose=False)
            assert [m for m in caplog.messages if "changed settings" in m] == said
