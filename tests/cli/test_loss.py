"""A loss that is named, wherever it is named, has the default parameters of its own class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.objectives.preference import (
    DPOP,
    IPO,
    LDDPO,
    SPPO,
    WPO,
    PreferenceLoss,
    SimPO,
    WeightedSum,
)

CONFIGS = Path(__file__).parents[2] / "configs"
FIT = ["fit", "--model", "DPOModule", "--model.base", "gpt2", "--data", "PreferenceDataModule"]
DPO_COMMAND = ["dpo", "--base", "gpt2"]
INNER = "{class_path: SimPO, init_args: {gamma: 0.3}}"


@pytest.fixture
def loss_of(alignkit: Callable, workplace: Path) -> Callable[..., PreferenceLoss]:
    """Return the loss that a command line would train with."""

    def run(*arguments: object) -> PreferenceLoss:
        status, out, err = alignkit(*arguments, "--data.path", "pairs.jsonl", "--print_config")
        assert status == 0, err
        given: dict[str, Any] = yaml.safe_load(out)["model"]["init_args"]["loss"]
        return PreferenceLoss.from_dict(given)

    return run


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        (["SimPO", "--model.loss.gamma", 0.7], SimPO(gamma=0.7)),
        (["WPO", "--model.loss.of", "SPPO"], WPO(SPPO())),
        (["WPO", "--model.loss.of", "SimPO", "--model.loss.of.gamma=0.5"], WPO(SimPO(gamma=0.5))),
        (["WPO", f"--model.loss.of={INNER}"], WPO(SimPO(gamma=0.3))),
        (
            ["WeightedSum", "--model.loss.terms", "[{class_path: WPO, init_args: {of: SPPO}}]"],
            WeightedSum((WPO(SPPO()),)),
        ),
        (["{class_path: WPO, init_args: {of: SimPO}}"], WPO(SimPO())),
        (["WPO", "--model.loss.of.class_path", "SPPO"], WPO(SPPO())),
        (["IPO", "--model.loss.class_path=SimPO", "--model.loss.gamma", 0.7], SimPO(gamma=0.7)),
    ],
    ids=lambda value: str(value),
)
def test_by_flags(flags: list[object], loss: PreferenceLoss, loss_of: Callable) -> None:
    assert loss_of(*FIT, "--model.loss", *flags) == loss
    assert loss_of(*FIT, "--model.loss.beta", 0.3, "--model.loss", *flags) == loss


@pytest.mark.parametrize(
    ("written", "loss"),
    [
        ("DPOP", DPOP()),
        ("{class_path: SimPO, init_args: {gamma: 0.5}}", SimPO(gamma=0.5)),
        ("{class_path: WPO, init_args: {of: SPPO}}", WPO(SPPO())),
        (f"{{class_path: WPO, init_args: {{of: {INNER}}}}}", WPO(SimPO(gamma=0.3))),
    ],
)
def test_in_a_file(written: str, loss: PreferenceLoss, loss_of: Callable) -> None:
    module = f"class_path: DPOModule\ninit_args:\n  base: gpt2\n  loss: {written}\n"
    Path("model.yaml").write_text(module)
    Path("c.yaml").write_text("model:\n  " + module.replace("\n", "\n  "))
    data = ["--data", "PreferenceDataModule"]
    assert loss_of("fit", "--config", "c.yaml", *data) == loss
    assert loss_of("fit", "--model", "model.yaml", *data) == loss
    assert loss_of("dpo", "--config=c.yaml", *data) == loss
    # What follows a file changes it, and what precedes it does not.
    assert loss_of("fit", "--config", "c.yaml", *data, "--model.loss", "IPO") == IPO()
    assert loss_of(*FIT, "--model.loss", "IPO", "--config", "c.yaml") == loss


def test_a_file_may_change_a_parameter_alone(loss_of: Callable) -> None:
    Path("c.yaml").write_text("model:\n  init_args:\n    loss:\n      init_args: {beta: 0.7}\n")
    assert loss_of(*FIT, "--model.loss", "SimPO", "--config", "c.yaml") == SimPO(beta=0.7)


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        (["--loss", "SimPO", "--model.loss.gamma", 0.5], SimPO(gamma=0.5)),
        (["--model.loss.gamma=0.5", "--loss", "SimPO", "--beta", 3], SimPO(beta=3, gamma=0.5)),
        (["--loss", "LDDPO", "--model.loss.beta", 0.5, "--seed", 1], LDDPO(beta=0.5)),
        (["--loss=WPO", "--model.loss.of", "SPPO", "--trainer.devices=1"], WPO(SPPO())),
        (["--model.loss.beta", 0.5, "--model.loss", "IPO", "--loss", "DPOP"], DPOP(beta=0.5)),
        (["--config", CONFIGS / "dpo_hh_pythia.yaml", "--loss", "SimPO"], SimPO()),
        (["--loss", "SimPO", "--config", CONFIGS / "dpo_hh_pythia.yaml"], SimPO()),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_by_the_short_flag(flags: list[object], loss: PreferenceLoss, loss_of: Callable) -> None:
    """Parameters go to the loss that it names, whatever stands first."""
    assert loss_of(*DPO_COMMAND, *flags) == loss


@pytest.mark.parametrize("flag", [["--model.loss.help", "SimPO"], ["--model.loss.help=SimPO"]])
def test_the_parameters_of_a_loss_are_told(flag: list[str], alignkit: Callable) -> None:
    status, out, err = alignkit(*FIT, *flag)
    assert status == 0, err
    assert "--loss.gamma GAMMA" in out and "--loss.beta BETA" in out


def test_a_mistake_inside_a_term_is_named(alignkit: Callable, workplace: Path) -> None:
    terms = "[{class_path: DPO, init_args: {gamma: 0.3}}]"
    loss = ["--model.loss", "WeightedSum", "--model.loss.terms", terms]
    status, _, err = alignkit(*FIT, "--data.path", "pairs.jsonl", *loss)
    assert status == 2
    assert err.startswith("alignkit: error: model.loss.terms.gamma: no such option"), err


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "{class_path: IPO, init_args: {betta: 3}}",
            "model.loss.betta: no such option of IPO; did",
        ),
        (
            "{class_path: WPO, init_args: {of: {class_path: IPO, init_args: {x: 3}}}}",
            "model.loss.of.x: no such option of IPO",
        ),
        ("", "model.loss: give a loss such as DPO(), not None"),
    ],
)
def test_a_mistake_in_a_file_is_named(written: str, said: str, alignkit: Callable) -> None:
    Path("c.yaml").write_text(f"model:\n  init_args:\n    loss: {written}\n")
    rest = ["--config", "c.yaml", "--data.path", "pairs.jsonl", "--trainer.max_steps", 1]
    status, _, err = alignkit(*FIT, *rest)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"alignkit: error: {said}"), err
