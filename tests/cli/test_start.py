"""``--model.init_from`` and ``--model.lora`` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.models.checkpoint import read_checkpoint
from tests.cli.test_fit import CONFIGS, quick


@pytest.fixture
def stage(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> Callable[..., tuple[int, str]]:
    """Run one step of a demo's stage; with ``plain``, of its configuration without ``lora``."""

    def run(name: str, *more: object, plain: bool = False) -> tuple[int, str]:
        arguments = quick(f"demo/{name}.yaml", model_dir, hh, text, 1)
        if plain:
            settings = yaml.safe_load((CONFIGS / f"demo/{name}.yaml").read_text())
            del settings["model"]["init_args"]["lora"]
            Path("plain.yaml").write_text(yaml.safe_dump(settings))
            arguments[2] = "plain.yaml"
        status, _, err = alignkit(*arguments, *more)
        return status, err

    return run


def lora_of(run: str) -> dict[str, Any]:
    return read_checkpoint(run)["hyper_parameters"]["lora"]


def test_stages_take_over_what_the_last_one_trained(stage: Callable, alignkit: Callable) -> None:
    """Neither a checkpoint nor an adapter needs its settings repeated; said wrong, both values."""
    sft, dpo = "runs/demo/sft", "runs/demo/dpo"
    chosen = ["--model.lora.r", 3, "--model.lora.alpha", 5, "--model.lora.targets", "up_proj"]
    assert stage("sft", *chosen, plain=True)[0] == 0
    assert lora_of(sft)["r"] == 3
    assert alignkit("export", "--model", sft, "--output", "adapter")[0] == 0
    for start in (sft, "adapter"):
        status, err = stage("dpo", "--model.init_from", start, plain=True)
        assert status == 0, err
        assert lora_of(dpo) | {"init": "gaussian"} == lora_of(sft)
        status, err = stage("dpo", "--model.init_from", start, "--model.lora", "auto")
        assert status == 0, err
        wrong = ["--model.lora.alpha", 64, "--model.init_from", start]
        status, err = stage("dpo", *chosen, *wrong, plain=True)
        assert status != 0
        assert "lora.alpha is 5 there and 64 here" in err
        assert "--model.lora.alpha 5" in err and "--model.lora auto" in err
        assert err.count("\n") == 1
        status, err = stage("dpo", "--model.lora", "null", "--model.init_from", start)
        assert status != 0 and "--to merged" in err


def test_resuming_under_another_scale_is_refused(stage: Callable) -> None:
    assert stage("sft")[0] == 0
    status, err = stage("sft", "--ckpt_path", "runs/demo/sft", "--model.lora.alpha", 64)
    assert status != 0
    assert "lora.alpha is 16 there and 64 here" in err and "ckpt_path" in err


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], {"r": 8, "alpha": 16}),
        (["--model.lora", "auto"], {"r": 8, "alpha": 16}),
        (["--model.lora.r", 2], {"r": 2, "alpha": 16}),
        (["--model.lora", "{r: 4, alpha: 2}"], {"r": 4, "alpha": 2}),
        (["--model.lora", "null", "--model.dtype", "float32"], None),
    ],
)
def test_every_way_to_say_which_adapter(
    stage: Callable, flags: list[object], want: dict[str, Any] | None, model_dir: Callable
) -> None:
    status, err = stage("sft", *flags, "--model.base", model_dir("gpt2"), plain=True)
    assert status == 0, err
    lora = lora_of("runs/demo/sft")
    assert lora is None if want is None else {key: lora[key] for key in want} == want
