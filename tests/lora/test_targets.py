"""Which modules a config means, and errors that teach when it means none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, LoRAEmbedding, LoRALinear, inject_lora
from alignkit.lora.targets import resolve

Make = Callable[..., PreTrainedModel]


def paths(model: PreTrainedModel, **options: object) -> list[str]:
    return list(resolve(model, LoRAConfig(**options)))  # type: ignore[arg-type]


def test_suffix_takes_every_block(tiny_model: Make) -> None:
    assert paths(tiny_model("gpt2"), targets="attn.c_attn") == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]


def test_whole_path_takes_one(tiny_model: Make) -> None:
    path = "model.layers.1.mlp.up_proj"
    assert paths(tiny_model("llama"), targets=path) == [path]


def test_a_suffix_stops_at_a_dot(tiny_model: Make) -> None:
    """``proj`` is no ending of ``c_proj`` at a dot."""
    with pytest.raises(AlignkitError, match="'proj' matches no module"):
        paths(tiny_model("gpt2"), targets="proj")


def test_regular_expression_over_whole_paths(tiny_model: Make) -> None:
    assert paths(tiny_model("gpt_neox"), targets=r".*\.1\.(mlp|attention)\.dense.*") == [
        "gpt_neox.layers.1.attention.dense",
        "gpt_neox.layers.1.mlp.dense_h_to_4h",
        "gpt_neox.layers.1.mlp.dense_4h_to_h",
    ]


@pytest.mark.parametrize(("family", "count"), [("gpt2", 8), ("gpt_neox", 8), ("llama", 14)])
def test_all_linear_leaves_the_head_out(tiny_model: Make, family: str, count: int) -> None:
    """Per block: gpt2 and gpt_neox 2 + 2 linear maps, llama 4 + 3; two blocks."""
    found = paths(tiny_model(family), targets="all-linear")
    assert len(found) == count
    assert not any("lm_head" in path or "embed" in path for path in found)


def test_exclude_and_layers_take_away(tiny_model: Make) -> None:
    model = tiny_model("llama")
    found = paths(model, targets="all-linear", exclude=("mlp.up_proj", ".*self_attn.*"), layers="1")
    assert found == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


def test_patterns_set_ranks(tiny_model: Make) -> None:
    model = inject_lora(
        tiny_model("llama"),
        LoRAConfig(
            targets=("q_proj", "v_proj"), r=8, rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}
        ),
    )
    ranks = [
        model.model.layers[i].self_attn.q_proj.adapters.default.lora_A.shape[1] for i in (0, 1)
    ]
    assert ranks == [2, 8]


def test_embedding_and_head_of_an_untied_model(tiny_model: Make) -> None:
    model = inject_lora(tiny_model("llama"), LoRAConfig(targets=("embed_tokens", "lm_head")))
    assert isinstance(model.get_input_embeddings(), LoRAEmbedding)
    assert isinstance(model.get_output_embeddings(), LoRALinear)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size


@pytest.mark.parametrize("side", ["wte", "lm_head"])
@pytest.mark.parametrize("how", ["targets", "modules_to_save"])
def test_one_side_of_a_tie_is_refused_unless_untied(tiny_model: Make, side: str, how: str) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(AlignkitError, match=r"shares its weight with .*untie=True"):
        inject_lora(model, LoRAConfig(**{how: (side,)}))  # type: ignore[arg-type]
    inject_lora(model, LoRAConfig(**{how: (side,), "untie": True}))  # type: ignore[arg-type]
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "attn.cattn"}, "near: attn.c_attn"),
        (
            {"targets": ("c_attn", "q_proj")},
            "'q_proj' matches no module; near: c_proj, mlp.c_proj, attn.c_proj, wte",
        ),
        ({"targets": "attn"}, "'attn' matches no module"),
        ({"targets": ".*mpl.*"}, "matches no module; near: "),
        ({"targets": "(.*"}, "no regular expression"),
        (
            {"exclude": "mlp.c_fcc"},
            "LoRAConfig.exclude: 'mlp.c_fcc' matches no module; near: mlp.c_fc",
        ),
        ({"exclude": ("c_attn", "c_proj", "c_fc")}, "leaves no module"),
        ({"layers": "1-4"}, "no layer 2; it has 0 to 1"),
        ({"targets": ("c_attn", "lm_head"), "layers": (0,)}, "leaves nothing of target 'lm_head'"),
        (
            {"targets": "c_attn", "rank_pattern": {"c_fc": 2}},
            "rank_pattern: 'c_fc' matches no adapted module",
        ),
        ({"alpha_pattern": {"q": 2}}, "alpha_pattern: 'q' matches no adapted module"),
        ({"modules_to_save": "ln_g"}, "'ln_g' matches no module with parameters; near: ln_f"),
        ({"targets": "wte", "init": "pissa", "untie": True}, "is for linear layers"),
        # The second kind of target fails, after layers of the first have been made.
        (
            {"targets": "all-linear", "init": "olora", "rank_pattern": {"mlp.c_proj": 33}},
            "rank of at most 32",
        ),
    ],
)
def test_errors_name_the_entry_and_what_is_near(
    tiny_model: Make, options: dict[str, object], words: str
) -> None:
    model = tiny_model("gpt2")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(AlignkitError) as error:
        inject_lora(model, LoRAConfig(**options))  # type: ignore[arg-type]
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
