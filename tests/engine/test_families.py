"""Every causal language model of transformers: scored exactly, or refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from alignkit.engine import Example, check_engine, collate, score
from alignkit.errors import AlignkitError
from tests.engine.families import KINDS, tiny_family


def tokens(count: int, seed: int) -> list[int]:
    return [10 + (17 * i * i + seed * i + 5) % 100 for i in range(count)]


# Sequences shorter and longer than the windows of 6 and the 16 positions of the tiny models, side
# by side, and responses that begin before a window's end and end after it.
EXAMPLES = [
    Example(tokens(9, 3), [tokens(5, 4), tokens(13, 5)]),
    Example([], [tokens(3, 6)]),
    Example(tokens(2, 1), [tokens(2, 7), tokens(1, 8), tokens(4, 2)]),
    Example(tokens(15, 9), [tokens(22, 1)]),
    Example([], [tokens(11, 2), tokens(30, 3)]),
]


# What must not fall back to being refused.
_EXACT = """
afmoe apertus arcee aria_text axk1 biogpt bitnet cohere_compass_text ctrl cwm dbrx deepseek_v2
deepseek_v3 deepseek_v3+values diffllama dots1 emu3 ernie4_5 ernie4_5_moe exaone4 exaone4+window
exaone_moe flex_olmo flint fuyu gemma gemma2+softcap gemma3 gemma3_text gemma4 gemma4_text
gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt2+scale
gpt_bigcode gpt_bigcode+heads gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3
iquestcoder jais2 jetmoe kolibri1 laguna llama llama+dynamic llama+llama3 llama+yarn llama4
llama4_text longcat_flash mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
ministral3 ministral3+scale mistral mistral+wide mistral-window mixtral mixtral+window mllama
moshi nemotron olmo olmo2 olmo3 olmo3+window olmoe opt persimmon phi phi3 phi3+window phimoe
phimoe+window qwen2 qwen2+window qwen2_moe qwen2_moe+window qwen3 qwen3+window qwen3_moe
qwen3_moe+window seed_oss smollm3 smollm3+window solar_open stablelm stablelm+parallel
starcoder2 starcoder2+window whisper youtu
"""
EXACT = set(_EXACT.split())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What transformers says about its own models is not at stake here."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    hf_logging.set_verbosity(before)


def plain_scores(model: PreTrainedModel, examples: Sequence[Example] = EXAMPLES) -> Tensor:
    """Score every response in a forward of its own, with transformers' attention."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    scores = []
    for example in examples:
        for response in example.responses:
            row = torch.tensor([[*example.prompt, *response]])
            logp_LV = model(row, use_cache=False).logits[0].log_softmax(-1)
            first = max(len(example.prompt), 1)
            scores.append(logp_LV[first - 1 : -1].gather(1, row[0, first:, None])[:, 0])
    return torch.cat(scores)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_exact_or_refused(kind: str) -> None:
    """To 1e-4 nats a token in fp32; no third outcome, be it a wrong score or another error."""
    model = tiny_family(kind)
    refusal = None
    with torch.no_grad():
        truth = plain_scores(model)
        try:
            check_engine(model)
            scores = score(model, collate(EXAMPLES))
        except AlignkitError as error:
            refusal = str(error)
    if refusal is None:
        torch.testing.assert_close(scores, truth, atol=1e-4, rtol=0)
    else:
        assert kind not in EXACT, refusal
        assert "\n" not in refusal
