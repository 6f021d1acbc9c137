"""Compiled blocks score as eager ones do, and one compilation serves rows of every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from alignkit.engine import Example, collate, compile_blocks, score
from alignkit.engine.compile import ROW_MULTIPLE, padded_for
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models.lean import lean_modules

# The compiler itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)
TARGETS = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "llama": "q_proj"}


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rows(*lengths: int) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 300, (3, n), generator=draw).tolist() for n in lengths]
    return [Example(prompt, [chosen, rejected[:-1]]) for prompt, chosen, rejected in ids]


def adapted(model: PreTrainedModel, family: str) -> PreTrainedModel:
    lean_modules(model)
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(r=2, targets=(TARGETS[family],)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_scores_and_gradients_are_the_eager_ones(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """In fp32, over rows of three lengths, one of which needs no padding."""
    eager = adapted(tiny_model(family), family)
    compiled = adapted(tiny_model(family), family)
    assert compile_blocks(compiled) == 2
    for lengths in ((20, 31), (9,), (43, 22)):
        batch = collate(rows(*lengths))
        results = []
        for model in (eager, compiled):
            logps = score(model, batch)
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append([logps.detach(), *torch.autograd.grad(logps.sum(), trained)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_new_length_is_no_new_compilation(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = adapted(tiny_model("llama"), "llama")
    compile_blocks(model)
    stats: Any = torch._dynamo.utils.counters["stats"]
    score(model, collate(rows(20, 31))).sum().backward()
    graphs = stats["unique_graphs"]
    assert graphs > 0
    for length in (9, 50, 100):
        score(model, collate(rows(length))).sum().backward()
    assert stats["unique_graphs"] == graphs


def test_rows_are_padded_only_for_a_compiled_model(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model, batch = tiny_model(), collate(rows(20))
    assert padded_for(model, batch) is batch
    compile_blocks(model)
    padded = padded_for(model, batch)
    assert padded.num_tokens == padded.position_ids.numel() == ROW_MULTIPLE
    assert padded.spans[-1].end == ROW_MULTIPLE
    assert padded.num_scored == batch.num_scored


def test_a_machine_without_a_compiler_is_told_so(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(AlignkitError, match=r"model.compile: .*\(no C\+\+ compiler\); install"):
        compile_blocks(tiny_model())
    with pytest.raises(AlignkitError, match="no blocks to compile"):
        compile_blocks(nn.Linear(2, 2))  # type: ignore[arg-type]
