"""The three data modules, from a path to batches."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignkit.data import (
    HHPreferenceDataModule,
    HHSFTDataModule,
    OpenWebTextDataModule,
    TextDataModule,
)
from alignkit.data.read import hub
from alignkit.engine import PackedBatch
from alignkit.errors import AlignkitError
from tests.data.conftest import pair, sentence, write_jsonl


def texts(data: Any, batches: Any) -> list[tuple[str, ...]]:
    """Every example of some batches as text: prompt, then responses."""
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    found = []
    for batch in batches:
        for span in batch.spans:
            bounds = [span.start, span.start + span.prompt]
            for length in span.responses:
                bounds.append(bounds[-1] + length)
            ids = batch.input_ids.tolist()
            found.append(tuple(tokenizer.decode(ids[i:j]) for i, j in pairwise(bounds)))
    return found


def published(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_preference_shows_every_pair_as_published(hh_dir: Path, make: Callable[..., Any]) -> None:
    data = make(HHPreferenceDataModule, hh_dir, tokens_per_batch=700)
    shown = texts(data, data.train_dataloader())
    eos = "<|endoftext|>"
    expected = [(r["chosen"] + eos, r["rejected"] + eos) for r in published(hh_dir / "train.jsonl")]
    assert sorted((p + c, p + r) for p, c, r in shown) == sorted(expected)
    assert all(batch.num_tokens <= 700 for batch in data.train_dataloader())
    held_out = texts(data, data.val_dataloader())
    assert len(held_out) == 11
    assert held_out == texts(data, data.test_dataloader())


def test_sft_takes_the_chosen_answer(hh_dir: Path, make: Callable[..., Any]) -> None:
    data = make(HHSFTDataModule, hh_dir)
    shown = texts(data, data.train_dataloader())
    expected = [row["chosen"] + "<|endoftext|>" for row in published(hh_dir / "train.jsonl")]
    assert sorted(prompt + answer for prompt, answer in shown) == sorted(expected)
    (batch, *_) = data.train_dataloader()
    assert batch.num_scored == sum(sum(span.responses) for span in batch.spans)


def test_sft_on_all_turns(hh_dir: Path, make: Callable[..., Any]) -> None:
    data = make(HHSFTDataModule, hh_dir, turns="all")
    (last,) = [make(HHSFTDataModule, hh_dir)]
    scored = [sum(b.num_scored for b in each.train_dataloader()) for each in (data, last)]
    assert scored[0] > scored[1]
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PackedBatch)
    assert batch.num_scored < sum(sum(span.responses) for span in batch.spans)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_openwebtext(
    tmp_path: Path, tokenizer_dir: Path, make: Callable[..., Any], packing: str
) -> None:
    rng = random.Random(1)
    documents = [sentence(rng, 1, 60) for _ in range(50)]
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in documents])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "bread and water"}])
    data = make(OpenWebTextDataModule, path.parent, block_size=64, packing=packing)
    batches = list(data.train_dataloader())
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = Counter(
        token
        for text in documents
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    )
    found = Counter(torch.cat([batch.input_ids for batch in batches]).tolist())
    if packing == "best_fit":  # an EOS left over from a document longer than a row predicts nothing
        del found[tokenizer.eos_token_id], expected[tokenizer.eos_token_id]
    assert found == expected
    assert all(span.end - span.start <= 64 for batch in batches for span in batch.spans)
    if packing == "best_fit":
        shown = [each for text in texts(data, batches) for each in text if each]
        whole = [text + "<|endoftext|>" for text in documents]
        short = {text for text in whole if len(tokenizer(text)["input_ids"]) <= 64}
        assert short <= set(shown)


def test_one_file_is_split_by_seed(tmp_path: Path, make: Callable[..., Any]) -> None:
    rng = random.Random(2)
    path = write_jsonl(tmp_path / "a.jsonl", [pair(rng) for _ in range(60)])

    def split(**options: Any) -> tuple[set[Any], set[Any]]:
        data = make(HHPreferenceDataModule, path, val_fraction=0.3, **options)
        return set(texts(data, data.train_dataloader())), set(texts(data, data.val_dataloader()))

    train, held_out = split()
    assert train.isdisjoint(held_out)
    assert len(train) + len(held_out) == 60
    assert len(held_out) == 18
    assert split() == (train, held_out)
    assert split(seed=1) != (train, held_out)


def test_limits(hh_dir: Path, make: Callable[..., Any]) -> None:
    data = make(HHPreferenceDataModule, hh_dir, max_train_examples=7, max_val_examples=3)
    assert sum(batch.num_examples for batch in data.train_dataloader()) == 7
    assert sum(batch.num_examples for batch in data.val_dataloader()) == 3
    first = [row["chosen"] for row in published(hh_dir / "train.jsonl")[:7]]
    shown = texts(data, data.train_dataloader())
    assert sorted(p + c for p, c, _ in shown) == sorted(text + "<|endoftext|>" for text in first)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_do_not_depend_on_workers(hh_dir: Path, make: Callable[..., Any]) -> None:
    orders = []
    for workers in (0, 1, 2):
        data = make(HHPreferenceDataModule, hh_dir, tokens_per_batch=700, num_workers=workers)
        orders.append([batch.input_ids.tolist() for batch in data.train_dataloader()])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_stream_alone(
    hh_dir: Path, make: Callable[..., Any], workers: int
) -> None:
    """Dropout draws from it: a run resumed between two epochs must find it as it was left."""
    data = make(HHPreferenceDataModule, path=str(hh_dir), num_workers=workers)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mix_by_weight(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Of 30 and 30 pairs at 3:1 an epoch draws 30 and 10, other ones each time."""
    paths = {}
    for number, name in enumerate(("base", "online")):
        rng = random.Random(number)
        (tmp_path / name).mkdir()
        for split, count in (("train", 30), ("test", 4)):
            rows = [pair(rng) for _ in range(count)]
            for row in rows:
                row["chosen"] += f" {name}"
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
        paths[str(tmp_path / name)] = 3.0 - 2 * number
    data = make(HHPreferenceDataModule, paths)
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        shown = texts(data, loader)
        names = Counter("online" if "online" in chosen else "base" for _, chosen, _ in shown)
        assert names == {"base": 30, "online": 10}
        drawn.append({text for text in shown if "online" in text[1]})
    assert drawn[0] != drawn[1] != drawn[2]
    assert len(texts(data, data.val_dataloader())) == 8
    both = make(HHPreferenceDataModule, list(paths))
    assert sum(batch.num_examples for batch in both.train_dataloader()) == 60


def test_counts_are_logged_once_and_kept(
    tmp_path: Path, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(3)
    rows = [pair(rng) for _ in range(20)]
    rows[4]["chosen"] = rows[4]["rejected"]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:3])
    for _ in range(2):  # encoded, then from the cache
        caplog.clear()
        data = make(HHPreferenceDataModule, tmp_path)
        with caplog.at_level(logging.INFO, "alignkit.data"):
            data.setup("fit")
            data.train_dataloader()
            data.val_dataloader()
        told = [r.message for r in caplog.records if "train.jsonl: 20 rows" in r.message]
        assert len(told) == 1
        assert "19 examples; dropped 1 (line 5); identical_pairs 1 (line 5)" in told[0]
        assert data.stats["identical_pairs"] == 1
        assert data.stats["truncated_frac"] == 0
        assert all(isinstance(value, int | float) for value in data.stats.values())


def test_the_truncated_share_is_counted(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Of 20 pairs the five with old turns lose them at 40 tokens."""
    question = "\n\nHuman: How do I bake bread?\n\nAssistant:"
    old = "\n\nHuman: " + "xyz " * 30 + "\n\nAssistant: yes"
    rows = [
        {"chosen": f"{before}{question} flour {i}", "rejected": f"{before}{question} salt {i}"}
        for i in range(20)
        for before in [old if i % 4 == 0 else ""]
    ]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    data = make(HHPreferenceDataModule, path, max_length=40)
    data.setup("fit")
    assert data.stats["truncated"] == 5
    assert data.stats["truncated_frac"] == 0.25


def test_nothing_left_is_an_error(tmp_path: Path, make: Callable[..., Any]) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}
    path = write_jsonl(tmp_path / "a.jsonl", [row] * 3)
    told = r"no example is left in train: its 3 rows were all dropped \(identical_pairs 3\)"
    with pytest.raises(AlignkitError, match=told):
        make(HHPreferenceDataModule, path).setup()
    pair = {"prompt": "a", "chosen": "b" * 90, "rejected": "c"}
    path = write_jsonl(tmp_path / "b.jsonl", [pair])
    with pytest.raises(AlignkitError, match=r"\(too_long 1\); raise data.max_length"):
        make(HHPreferenceDataModule, path, max_length=8).setup()
    with pytest.raises(AlignkitError, match="all held out or left out; give more rows, name"):
        make(HHPreferenceDataModule, path).setup()
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "short"}])
    with pytest.raises(AlignkitError, match="all held out or left out; give more rows, name"):
        make(TextDataModule, path, block_size=512).setup()


def test_a_negative_number_of_workers_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="num_workers=-1: must be 0 or more"):
        make(HHPreferenceDataModule, tmp_path, num_workers=-1)


def test_an_unreachable_hub_is_one_line(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(AlignkitError, match="a local directory or file") as caught:
        make(HHPreferenceDataModule, "Anthropic/hh-rlhf").setup()
    assert "\n" not in str(caught.value)


def test_a_hub_set_is_read_by_its_splits(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rng = random.Random(4)
    asked: list[Any] = []

    def load(*names: str, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list([pair(rng) for _ in range(9)]),
            test=datasets.Dataset.from_list([pair(rng) for _ in range(4)]),
        )

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    data = make(HHPreferenceDataModule, "Anthropic/hh-rlhf:helpful-base")
    assert sum(batch.num_examples for batch in data.train_dataloader()) == 9
    assert sum(batch.num_examples for batch in data.val_dataloader()) == 4
    assert asked == [(("Anthropic/hh-rlhf",), {"data_dir": "helpful-base", "streaming": False})]


def test_ranks_come_from_the_trainer(hh_dir: Path, make: Callable[..., Any]) -> None:
    """Three ranks of two micro-batches: no example twice, validation complete, ranks in step."""

    def rank_loaders(rank: int) -> tuple[Any, Any, Any]:
        data = make(HHPreferenceDataModule, hh_dir, tokens_per_batch=400)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=3, accumulate_grad_batches=2, current_epoch=1
        )
        return data, data.train_dataloader(), data.val_dataloader()

    ranks = [rank_loaders(rank) for rank in range(3)]
    assert len({len(train) for _, train, _ in ranks}) == 1
    assert len(ranks[0][1]) % 2 == 0
    shown = [text for data, train, _ in ranks for text in texts(data, train)]
    assert len(shown) == len(set(shown)) > 40 - 6
    held_out = [text for data, _, val in ranks for text in texts(data, val)]
    assert len(held_out) == len(set(held_out)) == 11


def test_only_rank_zero_tells_the_counts(
    hh_dir: Path, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = make(HHPreferenceDataModule, hh_dir)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    with caplog.at_level(logging.INFO, "alignkit.data"):
        data.setup()
    assert not [record for record in caplog.records if " rows, " in record.message]
