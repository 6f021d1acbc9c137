"""Losses of anyone's making: what is none is refused, and one that returns what was not asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alignkit.batch import PackedBatch
from alignkit.errors import AlignkitError
from alignkit.modules import DPOModule, KTOModule, RewardModule, SFTModule
from alignkit.modules.window import LossOutput
from alignkit.objectives.preference import (
    AOT,
    DPO,
    IPO,
    WPO,
    PairScores,
    PreferenceLoss,
    WeightedSum,
)
from alignkit.objectives.reward import BradleyTerry
from alignkit.objectives.unpaired import KTO
from alignkit.utils.plain import without_objects
from tests.modules.helpers import answers, loader, pairs, sgd, trainer


def margins(policy: PairScores, reference: PairScores) -> Tensor:
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


SLIPS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a column": (lambda x_B: x_B[:, None], r"\[4, 1\]"),
    "all pairs": (lambda x_B: x_B[:, None] - x_B, r"\[4, 4\]"),
    "a mean": (lambda x_B: x_B.mean(), r"\[\]"),
    "two": (lambda x_B: (x_B, x_B), "a tuple"),
    "a number": (lambda x_B: x_B.mean().item(), "a float"),
    "detached": (lambda x_B: x_B.detach(), "one without gradient"),
}


@dataclass(frozen=True)
class Slip(DPO):
    """Returns what a hand slips into."""

    slip: str = "a column"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        made: Tensor = SLIPS[self.slip][0](margins(policy, reference))
        return made


@dataclass(frozen=True)
class MeanRewards(DPO):
    """Has one reward for all pairs."""

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return -margins(policy, reference)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        chosen_B, rejected_B = super().rewards(policy, reference)
        return chosen_B.mean(), rejected_B.mean()


@dataclass(frozen=True)
class Scaled(PreferenceLoss):
    """Holds other losses."""

    gamma: float = 2.0
    of: PreferenceLoss = field(default_factory=lambda: IPO(beta=0.3))
    others: tuple[PreferenceLoss, ...] = ()
    shares: tuple[float, ...] = (0.5, 0.5)

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return self.gamma * self.of(policy, reference)


class Undecorated(DPO):
    """Has DPO's parameters."""

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return 2 * super().__call__(policy, reference)


class OwnInit(DPO):
    """Has a parameter that is no field, unlike DPO's."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__(beta=0.1 * gamma)


@dataclass(frozen=True)
class OwnKTO(KTO):
    """Would be KTO again, out of a checkpoint."""


@dataclass(frozen=True)
class OwnBradleyTerry(BradleyTerry):
    """Would be BradleyTerry again, out of a checkpoint."""


@dataclass(frozen=True)
class Numbers:
    """Are a parameter."""

    low: float = 0.25


class Bounds(NamedTuple):
    """Are another."""

    low: float = 0.5
    high: float = 0.75


@dataclass(frozen=True)
class Structured(DPO):
    """Has parameters that are no numbers."""

    numbers: Numbers = Numbers()
    bounds: Bounds = Bounds()  # noqa: RUF009 (immutable)
    parts: dict[str, PreferenceLoss] = field(default_factory=lambda: {"x": IPO(beta=0.7)})


class NoDataclass(PreferenceLoss):
    """Has parameters that no checkpoint would hold."""

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return margins(policy, reference)


@pytest.fixture
def fit(model_dir: Callable, tmp_path: Path) -> Callable[..., DPOModule]:
    """Train two steps of DPO, of four pairs each, with a loss."""

    def run(loss: PreferenceLoss, **options: Any) -> DPOModule:
        module = DPOModule(str(model_dir("gpt2")), loss=loss, optimizer=sgd)
        trainer(tmp_path, max_epochs=1, **options).fit(module, loader(pairs(8), 4))
        return module

    return run


@pytest.mark.parametrize("slip", SLIPS)
def test_a_loss_returns_one_number_a_pair(slip: str, fit: Callable) -> None:
    """A column broadcasts where it meets a row, a mean is counted once a pair, and so on."""
    said = r"Slip: must return one loss a pair or answer, \[4\], and returned "
    said += SLIPS[slip][1]
    for loss in (Slip(slip=slip), WPO(of=Slip(slip=slip)), WeightedSum((DPO(), Slip(slip=slip)))):
        with pytest.raises(AlignkitError, match=said) as caught:
            fit(loss)
        assert "\n" not in str(caught.value)


def test_a_loss_of_a_whole_step_is_checked_as_well(fit: Callable) -> None:
    @dataclass(frozen=True)
    class WholeMean(AOT):
        def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
            return super().__call__(policy, reference).mean()

    with pytest.raises(AlignkitError, match=r"WholeMean: must return .*, \[8\], and returned \[\]"):
        fit(WholeMean(), accumulate_grad_batches=2)


def test_an_objective_of_a_module_carries_a_gradient(model_dir: Callable, tmp_path: Path) -> None:
    class DetachedDPO(DPOModule):
        def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
            return super().preference_loss(policy, reference).detach()

    class DetachedSFT(SFTModule):
        def compute_loss(self, batch: PackedBatch) -> LossOutput:
            output = super().compute_loss(batch)
            return replace(output, loss_sum=output.loss_sum.detach())

    examples = {DetachedDPO: pairs(4), DetachedSFT: answers(4)}
    for kind in examples:
        module = kind(str(model_dir("gpt2")), optimizer=sgd)
        with pytest.raises(AlignkitError, match="a batch carries no gradient; leave out"):
            trainer(tmp_path, max_steps=1).fit(module, loader(examples[kind], 4))


def test_so_is_an_objective_of_a_module_and_a_reward(model_dir: Callable, fit: Callable) -> None:
    class MeanDPO(DPOModule):
        def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
            return margins(policy, reference).mean()

    module = MeanDPO(str(model_dir("gpt2")), optimizer=sgd)
    with pytest.raises(AlignkitError, match=r"MeanDPO: must return one loss .* and returned \[\]"):
        trainer(".", max_epochs=1).fit(module, loader(pairs(8), 4))
    with pytest.raises(
        AlignkitError, match=r"MeanRewards: must return one reward .* returned \[\]"
    ):
        fit(MeanRewards())


@pytest.mark.parametrize(
    ("module", "loss", "said"),
    [
        (DPOModule, None, r"such as DPO\(\), not None"),
        (DPOModule, "IPO", r"such as DPO\(\), not 'IPO'"),
        (DPOModule, IPO, r"such as DPO\(\), not <class"),
        (DPOModule, KTO(), r"such as DPO\(\), not KTO\("),
        (DPOModule, NoDataclass(), r"NoDataclass: put @dataclass\(frozen=True\) above"),
        (DPOModule, OwnInit(), r"OwnInit: put @dataclass\(frozen=True\) above.* place of __init__"),
        (KTOModule, OwnKTO(), r"OwnKTO: checkpoints hold the parameters of KTO alone"),
        (RewardModule, OwnBradleyTerry(), r"hold the parameters of BradleyTerry alone"),
        (KTOModule, DPO(), r"such as KTO\(\), not DPO\("),
        (KTOModule, None, r"such as KTO\(\), not None"),
        (RewardModule, DPO(), r"such as BradleyTerry\(\), not DPO\("),
        (RewardModule, BradleyTerry, r"such as BradleyTerry\(\), not <class"),
    ],
)
def test_what_is_no_loss_of_the_module_is_refused(module: Any, loss: Any, said: str) -> None:
    """Before the model is looked for."""
    with pytest.raises(AlignkitError, match=r"model\.loss.*" + said):
        module("nowhere", loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        Scaled(),
        Scaled(3.0, Scaled(of=DPO(beta=0.7)), (IPO(), DPO(0.2)), (0.3, 0.7)),
        Undecorated(beta=0.4),
        WeightedSum((Scaled(of=DPO(0.3)), Undecorated()), (0.25, 0.75)),
        BradleyTerry(margin=0.5),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_inside_losses_survive_plain_values(
    loss: PreferenceLoss, model_dir: Callable, tmp_path: Path
) -> None:
    made = loss.to_dict()
    assert type(loss).from_dict(made) == loss
    kind = RewardModule if isinstance(loss, BradleyTerry) else DPOModule
    module = kind(str(model_dir("gpt2")), loss=loss, optimizer=sgd)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader(pairs(4), 4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["loss"] == made
    assert kind.load_from_checkpoint(tmp_path / "last.ckpt").loss == loss


def test_parameters_of_any_structure_are_in_the_checkpoint(model_dir: Callable) -> None:
    module = DPOModule(str(model_dir("gpt2")), loss=Structured(), optimizer=sgd)
    kept = module.hparams["loss"]["init_args"]
    assert (kept["numbers"], kept["bounds"]) == ({"low": 0.25}, (0.5, 0.75))
    assert type(kept["bounds"]) is tuple
    assert without_objects({"loss": module.hparams["loss"]}) == {"loss": module.hparams["loss"]}
    again = PreferenceLoss.from_dict(module.hparams["loss"])
    assert isinstance(again, Structured) and again.parts == {"x": IPO(beta=0.7)}


def test_a_metric_may_call_a_loss_without_gradients(model_dir: Callable, tmp_path: Path) -> None:
    class Twice(DPOModule):
        def metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
            again = self.loss(policy, reference).sum()
            return super().metrics(policy, reference) | {"again": again}

    for loss in (WeightedSum((DPO(), IPO())), WPO()):
        module = Twice(str(model_dir("gpt2")), loss=loss, optimizer=sgd)
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, loader(pairs(4), 4))
        assert run.callback_metrics["train/again"] == run.callback_metrics["train/loss"]


def test_a_module_may_have_scores_of_its_own(model_dir: Callable, tmp_path: Path) -> None:
    class Own(NamedTuple):
        differences: Tensor

    class Module(DPOModule):
        def scores(self, batch: Any, recompute: bool = False) -> Any:
            policy, reference = super().scores(batch, recompute)
            return Own(margins(policy, reference)), Own(margins(reference, reference))

        def preference_loss(self, policy: Any, reference: Any) -> Tensor:
            return -policy.differences

        def watched_metrics(self, policy: Any, reference: Any) -> dict[str, Tensor]:
            return {"margin": policy.differences.sum().detach()}

    module = Module(str(model_dir("gpt2")), optimizer=sgd)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader(pairs(4), 4))
    assert run.callback_metrics["train/loss"].abs() < 1e-4
