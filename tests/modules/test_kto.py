"""KTO's module and its data: unpaired rows, mismatched answers, and a validation's own KL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.cli import main
from alignkit.data import UnpairedDataModule
from alignkit.data.keep.mismatched import _others
from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import read_checkpoint
from alignkit.modules import KTOModule
from alignkit.modules.kto import HeldOut
from alignkit.objectives.unpaired import KTO, UnpairedScores
from tests.modules.helpers import loader, logged_steps, pairs, sgd, trainer


def unpaired(count: int, seed: int = 0) -> list[Example]:
    """Random answers, every third a bad one, with mismatched ones."""
    return [
        Example(each.prompt, each.responses, label=i % 3 != 2)
        for i, each in enumerate(pairs(count, seed))
    ]


def moved(module: KTOModule) -> KTOModule:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return module


def by_hand(module: KTOModule, examples: list[Example]) -> dict[str, torch.Tensor]:
    batch = collate(examples)
    with torch.no_grad():
        ours = response_sums(score(module.model, batch), batch)
    scores = [
        UnpairedScores.from_responses(sums, torch.tensor([e.label for e in examples]))
        for sums in (ours, module.reference.sums(batch))
    ]
    rewards = module.loss.rewards(*scores)
    chosen, rejected = rewards[scores[0].good].mean(), rewards[~scores[0].good].mean()
    return {
        "loss": module.loss(*scores).mean(),
        "kl": module.loss.point(scores[0].mismatched - scores[1].mismatched),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
    }


def test_a_batch_by_plain_scores(model_dir: Callable) -> None:
    module = moved(KTOModule(str(model_dir("llama")), loss=KTO(0.5, 1.5, 0.7)))
    examples = unpaired(7)
    output = module.compute_loss(collate(examples))
    assert output.weight == 7
    expected = by_hand(module, examples)
    torch.testing.assert_close(output.loss_sum / 7, expected["loss"], rtol=1e-4, atol=1e-5)
    means = {name: value / 7 for name, value in output.metrics.items()}
    shown = module.logged_means(means)
    for name, value in shown.items():
        if name in expected:
            torch.testing.assert_close(value.float(), expected[name], rtol=1e-4, atol=1e-5)
    assert shown.keys() == {*expected, "logps/chosen", "logps/rejected"} - {"loss"}
    output.loss_sum.backward()


def test_a_validation_is_one_batch_however_it_is_cut(model_dir: Callable, tmp_path: Path) -> None:
    """Its loss is that of all rows with their own z₀, which a batch's is not."""
    module = moved(KTOModule(str(model_dir("gpt2")), loss=KTO(0.5)))
    examples = unpaired(9)
    expected = by_hand(module, examples)
    seen = []
    for size in (2, 9):
        run = trainer(tmp_path)
        (logged,) = run.validate(module, loader(examples, size), verbose=False)
        seen.append(logged)
        for name, value in expected.items():
            assert logged[f"val/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert seen[0].keys() == seen[1].keys() == {f"val/{name}" for name in expected}


def test_training_logs_means_of_each_kind(model_dir: Callable, tmp_path: Path) -> None:
    """Windows of three rows and of two: means over the good ones and over the bad ones."""
    module = KTOModule(
        str(model_dir("gpt2")), optimizer=sgd, reference_cache=str(tmp_path / "cache")
    )
    logged = logged_steps(module)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, loader(unpaired(8), 2))
    assert logged["train/loss"][0] == pytest.approx(0.5, abs=1e-5)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert len(logged[f"train/{name}"]) == 2, name
    first = collate(unpaired(8)[:4])
    with torch.no_grad():
        fresh = KTOModule(str(model_dir("gpt2")))
        sums = response_sums(score(fresh.model, first), first)[0::2]
    good = torch.tensor([e.label for e in unpaired(8)[:4]])
    assert logged["train/logps/chosen"][0] == pytest.approx(sums[good].mean().item(), rel=1e-5)
    assert logged["train/logps/rejected"][0] == pytest.approx(sums[~good].mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [4, 1])
def test_a_step_is_the_same_however_it_is_cut(
    size: int, model_dir: Callable, tmp_path: Path
) -> None:
    """z₀ is that of all its rows, for windows of two and of eight micro-batches."""
    examples, ends = unpaired(16), []
    for each in (8, size):
        torch.manual_seed(0)
        module = KTOModule(
            str(model_dir("gpt2")), optimizer=sgd, loss=KTO(1.0), schedule="constant_with_warmup"
        )
        with torch.no_grad():  # a worse reference, so that z₀ > 0
            for _, parameter in module._reference_parameters():
                parameter.normal_(std=0.2)
        module.reference._agreed = True
        logged = logged_steps(module)
        run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=8 // each)
        run.fit(module, loader(examples, each))
        ends.append((module.state_dict(), logged))
    (whole, expected), (state, logged) = ends
    assert expected["train/kl"][0] > 0.1
    for name in ("train/loss", "train/kl", "train/grad_norm", "train/rewards/margins"):
        # Log-probs are sums of hundreds, rounded to fp32.
        close = 1e-6 if name == "train/loss" else 1e-5
        assert logged[name] == pytest.approx(expected[name], rel=1e-5, abs=close), name
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-5)


def test_a_batch_is_scored_by_one_rank_alone(
    model_dir: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rows at fault of a step that is not finite are sought: the others would not answer."""
    module = KTOModule(str(model_dir("gpt2"))).train()
    module.trainer = trainer(tmp_path)

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asks all ranks")

    monkeypatch.setattr(module.trainer.strategy, "reduce", ask)
    monkeypatch.setattr(torch.distributed, "all_gather_object", ask)
    assert module.compute_loss(collate(unpaired(2))).loss_sum.isfinite()


def test_nothing_is_logged_of_answers_that_are_not_there(
    model_dir: Callable, tmp_path: Path
) -> None:
    """The second step and the validation have good ones alone."""
    module = KTOModule(str(model_dir("gpt2")), optimizer=sgd)
    both, good = unpaired(4), [Example(e.prompt, e.responses, label=True) for e in pairs(4)]
    logged = logged_steps(module)
    trainer(tmp_path, max_epochs=1).fit(module, loader([*both, *good], 4), loader(good, 2))
    for name, count in (("chosen", 2), ("rejected", 1), ("margins", 1)):
        assert len(logged[f"train/rewards/{name}"]) == count, name
    assert all(value == value for values in logged.values() for value in values)
    (shown,) = trainer(tmp_path).validate(
        KTOModule(str(model_dir("gpt2"))), loader(good, 2), verbose=False
    )
    assert shown.keys() == {"val/loss", "val/kl", "val/rewards/chosen"}


def test_what_is_no_unpaired_row_is_refused(model_dir: Callable) -> None:
    module = KTOModule(str(model_dir("gpt2")))
    for examples in (pairs(2), [Example([1], [[2]], label=True)]):
        with pytest.raises(AlignkitError, match="use UnpairedDataModule"):
            module.compute_loss(collate(examples))
    with pytest.raises(AlignkitError, match=r"model\.reference none: KTO compares"):
        KTOModule(str(model_dir("gpt2")), reference="none")


def test_a_reference_without_checks_is_refused(model_dir: Callable, tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="reference_checks=0: give at least 1"):
        KTOModule(str(model_dir("gpt2")), reference_cache=str(tmp_path), reference_checks=0)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": f"Say {n}, then rest.", "completion": f"{n}." * (1 + n % 5), "label": n % 3 != 0}
    for n in range(24)
]


def data(tmp_path: Path, tokenizer: Path, rows: list[dict], **options: object):
    module = UnpairedDataModule(
        str(tokenizer), str(write(tmp_path / "rows.jsonl", rows)), cache_dir=str(tmp_path / "c"),
        val_fraction=0.2, **options,
    )  # fmt: skip
    module.setup()
    return module


def test_each_row_has_an_answer_of_another_prompt(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Labels travel with rows; lengths are those of the examples; all are cut to max_length."""
    module = data(tmp_path, tokenizer_dir, ROWS, max_length=40)
    examples = module._set("train")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    by_prompt = {row["prompt"]: row for row in ROWS}
    cut = 0
    for index in range(len(examples)):
        example = examples[index]
        texts = [tokenizer.decode(part) for part in (example.prompt, *example.responses)]
        asked = next(row for prompt, row in by_prompt.items() if prompt in texts[0])
        assert asked["completion"] in texts[1]
        assert example.label is asked["label"]
        assert asked["completion"] + "<" not in texts[2].strip()
        assert examples.lengths[index] == example.num_tokens
        assert max(len(example.prompt) + len(part) for part in example.responses) <= 40
        cut += not texts[2].endswith("<|endoftext|>")
    assert cut
    batch = next(iter(module.train_dataloader()))
    assert batch.labels.dtype == torch.bool
    assert batch.take([1]).labels.tolist() == batch.labels[[1]].tolist()
    again = data(tmp_path, tokenizer_dir, ROWS, max_length=40)._set("train")
    assert [e.label for e in again] == [e.label for e in examples]


def paired(n: int, good: bool) -> dict:
    return {"prompt": f"Say {n}, then rest.", "completion": f"{n}, {good}.", "label": good}


GOOD, BAD = ([paired(n, good) for n in range(20)] for good in (True, False))


@pytest.mark.parametrize("order", ["good, then bad", "neighbours", "two files", "a folder"])
def test_no_order_of_rows_brings_answers_back_to_their_prompts(
    order: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Pairs taken apart lie half the set from each other, or side by side."""
    rows = {
        "neighbours": [row for both in zip(GOOD, BAD, strict=True) for row in both],
        "good, then bad": [*GOOD, *BAD],
    }
    path: str | list[str] = str(write(tmp_path / "rows.jsonl", rows.get(order, GOOD)))
    if order == "two files":
        path = [path, str(write(tmp_path / "bad.jsonl", BAD))]
    elif order == "a folder":
        path = str(tmp_path / "both")
        (tmp_path / "both").mkdir()
        write(tmp_path / "both" / "train.jsonl", [*GOOD, *BAD])
        write(tmp_path / "both" / "validation.jsonl", [*GOOD[:3], *BAD[:3]])
    options = {} if order == "a folder" else {"val_fraction": 0.2}
    module = UnpairedDataModule(str(tokenizer_dir), path, cache_dir=str(tmp_path / "c"), **options)
    module.setup()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for name in ("train", "validation"):
        examples = module._set(name)
        assert len(examples) >= 6
        for index in range(len(examples)):
            prompt, own, other = map(
                tokenizer.decode, (examples[index].prompt, *examples[index].responses)
            )
            asked = prompt.split("Say ")[1].split(",")[0]
            assert own.startswith(f" {asked},"), own
            assert not other.startswith(f" {asked},"), other
            assert examples.lengths[index] == examples[index].num_tokens


def test_rows_of_one_prompt_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [{**row, "prompt": "Say it."} for row in ROWS]
    with pytest.raises(AlignkitError, match="the train split holds one prompt alone; mismatched"):
        data(tmp_path, tokenizer_dir, rows)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_another_prompt_for_every_row(prompts: list[int]) -> None:
    found = _others(np.array(prompts, np.uint64)).tolist()
    assert len(found) == (len(prompts) if len(set(prompts)) > 1 else 0)
    half = len(prompts) // 2
    for index, other in enumerate(found):
        away = (index + half) % len(prompts)
        turned = [*range(away, len(prompts)), *range(away)]
        assert other == next(i for i in turned if prompts[i] != prompts[index])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": None}, "`label` must say whether the answer is good"),
        ({"label": "perhaps"}, r"true or false \(it is 'perhaps'\)"),
    ],
)
def test_a_row_without_a_label_is_refused(
    change: dict, said: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(AlignkitError, match=said) as error:
        data(tmp_path, tokenizer_dir, [*ROWS[:5], {**ROWS[5], **change}])
    assert "rows.jsonl:6" in str(error.value)


@pytest.mark.parametrize("prompt_format", ["boundary", "raw"])
def test_from_the_command_line(
    prompt_format: str, tmp_path: Path, model_dir: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "rows.jsonl", ROWS)
    arguments = [
        "fit", "--model", "KTOModule", "--model.base", model_dir("gpt2"),
        "--model.loss.beta", 0.3, "--model.loss.undesirable_weight", 2,
        "--data", "UnpairedDataModule", "--data.path", path,
        "--data.prompt_format", prompt_format, "--data.val_fraction", 0.3, "--trainer.max_steps", 2,
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    kept = read_checkpoint(next(Path.cwd().rglob("*.ckpt")))["hyper_parameters"]["loss"]
    assert KTO.from_dict(kept) == KTO(0.3, undesirable_weight=2.0)


def test_a_rank_without_rows_has_the_dtypes_of_the_others() -> None:
    """Metrics of torchmetrics gather fp32 from a rank that was given nothing."""
    metric = HeldOut(KTO(), "loss")
    ones = torch.ones(2)
    metric.update(*2 * [UnpairedScores(ones, ones, torch.tensor([True, False]))])
    states = [*metric.ratios, *metric.mismatched, *metric.good]
    assert {each.dtype for each in states} == {torch.float32}
    assert metric.compute().item() == pytest.approx(0.5)
