"""LoRAConfig: plain values in, checked, and out again."""

from __future__ import annotations

import json
import math

import pytest
from jsonargparse import ArgumentParser

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig


def test_lists_and_ranges_become_tuples() -> None:
    config = LoRAConfig(targets=["q_proj"], exclude="lm_head", layers="0-2, 5", r=4)  # type: ignore[arg-type]
    assert config.targets == ("q_proj",)
    assert config.exclude == ("lm_head",)
    assert config.layers == (0, 1, 2, 5)


def test_survives_json() -> None:
    config = LoRAConfig(layers="1-2", rank_pattern={"c_attn": 4}, modules_to_save=("ln_f",))
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_scale_by_hand() -> None:
    """α/r = 16/8 = 2; rsLoRA (arXiv:2312.03732) α/√r = 16/√8 = 5.657."""
    assert LoRAConfig(r=8, alpha=16).scale == 2
    assert LoRAConfig(r=8, alpha=16, use_rslora=True).scale == pytest.approx(16 / math.sqrt(8))


def test_patterns_set_rank_and_alpha_of_a_module() -> None:
    config = LoRAConfig(
        r=8, alpha=16, rank_pattern={r"h\.0\..*": 2, "c_attn": 4}, alpha_pattern={"c_proj": 1}
    )
    own = [
        config.for_module(f"transformer.h.{i}.attn.{n}") for i, n in ((0, "c_attn"), (1, "c_attn"))
    ]
    assert [c.r for c in own] == [2, 4]
    assert config.for_module("transformer.h.1.attn.c_proj").alpha == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "LoRAConfig.r is 0"),
        ({"rank_pattern": {"c_attn": -1}}, "rank_pattern['c_attn']"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "xavier"}, "gaussian, kaiming, pissa, olora, orthogonal"),
        ({"bias": "some"}, "none, all, lora_only"),
        ({"init": "orthogonal", "r": 3}, "even rank"),
        ({"layers": "3-1"}, "ranges"),
        ({"layers": "first"}, "ranges"),
        ({"targets": ()}, "targets is empty"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"init_std": 0.0}, "init_std"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_refuses_what_cannot_work(values: dict[str, object], words: str) -> None:
    with pytest.raises(AlignkitError) as error:
        LoRAConfig(**values)  # type: ignore[arg-type]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_unknown_keys() -> None:
    with pytest.raises(AlignkitError, match="unknown keys rank"):
        LoRAConfig.from_dict({"rank": 8})


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--lora.targets", "all-linear"], "targets", ("all-linear",)),
        (["--lora.targets", '["q_proj", "v_proj"]'], "targets", ("q_proj", "v_proj")),
        (["--lora.layers", "0-1"], "layers", (0, 1)),
        (["--lora.rank_pattern", '{"c_attn": 4}'], "rank_pattern", {"c_attn": 4}),
        (["--lora.init", "pissa"], "init", "pissa"),
    ],
)
def test_reads_from_the_command_line(arguments: list[str], field: str, value: object) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--lora", type=LoRAConfig, default=LoRAConfig())
    config = parser.instantiate(parser.parse_args(arguments)).lora
    assert getattr(config, field) == value
