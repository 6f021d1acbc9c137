"""Drawing text: against a plain loop, and the same whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from alignkit.errors import AlignkitError
from alignkit.models import load_tokenizer
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.prompts import TURN
from alignkit.tools.generate.sampling import Sampling, _GumbelNoise, _RepetitionPenalty, complete

GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_new_tokens=12)
PROMPTS = ["How do I", "bread", "Mix flour, water, salt and yeast. " * 3, "Assistant: Mix", "x y"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tokenizer_dir))


class Scripted(GPT2LMHeadModel):
    """Says `script` after a prompt of `prompt` tokens, then 'x' for ever."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int, script: list[int]) -> None:
        super().__init__(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=64,
                n_embd=8,
                n_layer=1,
                n_head=1,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        self.prompt, self.script = prompt, script
        self.rest = tokenizer.convert_tokens_to_ids("x")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        said = int(kwargs["attention_mask"][0].sum()) - self.prompt
        token = self.script[said] if said < len(self.script) else self.rest
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., token] = 100.0
        return output


def plain_greedy(model: PreTrainedModel, ids: list[int], eos: int, new: int) -> list[int]:
    """No cache, no padding, one token a forward."""
    answer: list[int] = []
    for _ in range(new):
        token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == eos:
            break
        answer.append(token)
    return answer


@torch.no_grad()
def test_greedy_is_the_plain_loop(
    tiny_model: Callable[..., PreTrainedModel], family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(family)
    expected = [
        tokenizer.decode(plain_greedy(model, tokenizer(p)["input_ids"], 0, 12)).strip()
        for p in PROMPTS
    ]
    assert list(complete(model, tokenizer, PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(
    tiny_model: Callable[..., PreTrainedModel],
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
) -> None:
    """EOS pads here: transformers' repetition penalty would count the padding as seen."""
    sampling = Sampling(temperature=temperature, repetition_penalty=1.5, max_new_tokens=24, seed=3)
    model = tiny_model(family)
    found = {
        size: list(complete(model, tokenizer, PROMPTS, sampling, batch_size=size))
        for size in (1, 2, 5)
    }
    assert found[1] == found[2] == found[5]
    assert len(set(found[1])) == len(PROMPTS)


@pytest.mark.parametrize("stopped", [{"stop": "e"}, {"generation": {"stop_strings": ["e", "o"]}}])
@pytest.mark.parametrize("pad", ["eos", "own", "of the vocabulary"])
def test_an_answer_ends_where_it_was_stopped(
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer_dir: Path,
    pad: str,
    stopped: dict[str, Any],
) -> None:
    """What is known of it does not depend on how long the others of its batch go on."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    model = tiny_model()
    if pad != "eos":
        tokenizer.pad_token = "x" if pad == "of the vocabulary" else tokenizer.decode([3])
    sampling = Sampling(temperature=1.0, top_p=1, max_new_tokens=16, seed=3, **stopped)
    heard: dict[int, list[Answer]] = {1: [], 5: []}
    for size, answers in heard.items():
        list(complete(model, tokenizer, PROMPTS, sampling, batch_size=size, heard=answers.append))
    assert heard[1] == heard[5]
    assert len({len(answer.ids) for answer in heard[5]}) > 1, "one was stopped before another"


def test_the_seed_decides(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same prompt twice is drawn twice; the global generator takes no part."""
    model = tiny_model()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(texts))
        sampling = Sampling(temperature=1, max_new_tokens=16, seed=seed)
        texts.append(list(complete(model, tokenizer, ["bread", "bread"], sampling)))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_gumbel_noise_draws_from_the_softmax() -> None:
    """6,000 draws from (0.6, 0.3, 0.1, 0) are within 4 standard deviations of it."""
    draws = 6000
    probabilities = [0.6, 0.3, 0.1, 0.0]
    scores = torch.tensor(probabilities).log().expand(draws, 4)
    tokens = _GumbelNoise(0, range(draws))(torch.empty(draws, 1), scores).argmax(1)
    counts = Counter(tokens.tolist())
    for token, p in enumerate(probabilities):
        assert abs(counts[token] - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5


def test_top_p_keeps_to_the_nucleus(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A nucleus smaller than the likeliest token holds that token alone: greedy."""
    model = tiny_model()
    sampling = Sampling(temperature=1, top_p=1e-6, repetition_penalty=1, max_new_tokens=12)
    assert list(complete(model, tokenizer, PROMPTS, sampling)) == list(
        complete(model, tokenizer, PROMPTS, GREEDY)
    )


def test_repetition_penalty_is_blind_to_padding() -> None:
    """Row 0 is [pad, 5, 5, 7] with pad = 0: as transformers' own on [5, 5, 7], 0 untouched."""
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0, -2.0]])
    mask = torch.tensor([[0, 1, 1]])
    penalised = _RepetitionPenalty(2.0, mask)(torch.tensor([[0, 5, 5, 7]]), scores.clone())
    assert penalised.tolist() == [[3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, -4.0]]
    theirs = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[5, 5, 7]]), scores.clone())
    assert torch.equal(penalised, theirs)


def test_answers_end_at_the_next_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = "How do I"
    script = tokenizer(" Mix flour." + TURN + " More?")["input_ids"]
    model = Scripted(tokenizer, len(tokenizer(prompt)["input_ids"]), script).eval()
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    sampling = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=40, stop=TURN)
    assert list(complete(model, tokenizer, [prompt], sampling)) == ["Mix flour."]
    assert len(steps) < len(script), "generation went on after the stop text"
    without = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=40)
    (text,) = complete(model, tokenizer, [prompt], without)
    assert text.startswith("Mix flour.\n\nHuman: More?xxx")


def test_answers_end_at_eos_even_where_it_pads(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = "How do I"
    script = [*tokenizer(" Mix flour.")["input_ids"], tokenizer.eos_token_id]
    model = Scripted(tokenizer, len(tokenizer(prompt)["input_ids"]), script).eval()
    sampling = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=40)
    assert list(complete(model, tokenizer, [prompt], sampling)) == ["Mix flour."]


def test_the_model_is_left_as_it_was_and_its_defaults_unused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model()
    expected = list(complete(model, tokenizer, PROMPTS, GREEDY))
    first = tokenizer(expected[0])["input_ids"][0]
    model.train()
    model.transformer.h[0].eval()
    defaults = model.generation_config
    defaults.suppress_tokens, defaults.min_new_tokens = [first], 12
    assert list(complete(model, tokenizer, PROMPTS, GREEDY)) == expected
    assert model.generation_config is defaults
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training


def test_an_answer_past_the_context_is_refused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    length = len(tokenizer("bread")["input_ids"])
    sampling = Sampling(max_new_tokens=512)
    with pytest.raises(
        AlignkitError,
        match=f"prompt 1 has {length} tokens.*max_new_tokens 512 passes the model's context of 512",
    ):
        list(complete(tiny_model(), tokenizer, ["bread"], sampling))


def test_healing_needs_a_bos(tiny_model: Callable, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of which transformers would fail inside torch."""
    sampling = Sampling(max_new_tokens=2, generation={"token_healing": True})
    with pytest.raises(AlignkitError, match="token_healing: needs a tokenizer with a BOS token"):
        list(complete(tiny_model(), tokenizer, ["bread"], sampling))


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, fed = tiny_model(), []
    generate = model.generate
    model.generate = lambda ids, **options: fed.append(ids[0].tolist()) or generate(ids, **options)
    for kind in ("boundary", "raw"):
        list(complete(model, tokenizer, ["a<|endoftext|>"], GREEDY, kind=kind))
    assert tokenizer.eos_token_id not in fed[0]
    assert fed[1] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]


def test_an_empty_prompt_is_refused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(AlignkitError, match="prompt 2 is empty"):
        list(complete(tiny_model(), tokenizer, ["bread", ""], GREEDY))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
    ],
)
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(AlignkitError, match=rf"^{name}: must be .*, got {value}$"):
        Sampling(**{name: value})  # type: ignore[arg-type]
