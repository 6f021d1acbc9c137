"""A position is worth nothing without the data and the batches it was a position in."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import (
    HHPreferenceDataModule,
    HHSFTDataModule,
    OpenWebTextDataModule,
    TokenBudgetBatchSampler,
)
from alignkit.data.keep.position import differences
from alignkit.errors import AlignkitError
from tests.data.conftest import pair, sentence, write_jsonl
from tests.data.test_resume import Recorder, SaveAndStop, quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
Change = Callable[[Path], None]


def train(
    data: Any, *callbacks: Any, resume: Path | None = None, steps: int = -1, accumulate: int = 1
) -> list[Any]:
    module = Recorder()
    trainer = quiet(
        max_epochs=-1 if steps > 0 else 2,
        max_steps=steps,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


def stopped(data: Any, path: Path, after: int, hook: str = "on_train_batch_end") -> Path:
    with pytest.raises(SystemExit):
        train(data, SaveAndStop(after, path, hook), steps=40 if hasattr(data, "streaming") else -1)
    return path


def permute(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[1:], lines[0]]))


def edit(path: Path) -> None:
    """Other words in one row."""
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace("bread", "BREAD").replace("water", "WATER").replace("oven", "OVEN")
    assert "".join(lines) != path.read_text()
    path.write_text("".join(lines))


def swap_two(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[4], lines[9] = lines[9], lines[4]
    path.write_text("".join(lines))


class TestPairs:
    @pytest.fixture
    def data(self, hh_dir: Path, make: Callable[..., Any]) -> Callable[..., Any]:
        def build(**options: Any) -> Any:
            return make(HHPreferenceDataModule, hh_dir, **{"tokens_per_batch": 900, **options})

        return build

    @pytest.mark.parametrize("change", [permute, edit, swap_two])
    def test_changed_rows_are_refused_with_both_digests(
        self, data: Callable[..., Any], hh_dir: Path, tmp_path: Path, change: Change
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        change(hh_dir / "train.jsonl")
        with pytest.raises(
            AlignkitError,
            match=r"mid-epoch.*train\.jsonl's content changed \(digest \w{8}… → \w{8}…\)",
        ) as caught:
            train(data(), resume=path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokens_per_batch": 700}, "tokens_per_batch 900 → 700"),
            ({"examples_per_batch": 4}, "examples_per_batch None → 4"),
            ({"seed": 3}, "seed 0 → 3"),
            ({"max_length": 30}, r"tokens changed .* → .*max_length 512 → 30"),
            (
                {"prompt_format": "stripped"},
                r"tokens changed .*format \['boundary'.* → \['stripped'",
            ),
            (
                {"max_train_examples": 39},
                r"examples taken from .*max_train_examples None → 39",
            ),
        ],
    )
    def test_changed_settings_are_named(
        self, data: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        with pytest.raises(AlignkitError, match=message):
            train(data(**options), resume=path)

    def test_another_held_out_share_is_named(
        self, make: Callable[..., Any], hh_dir: Path, tmp_path: Path
    ) -> None:
        def data(share: float) -> Any:
            path = hh_dir / "train.jsonl"
            return make(HHPreferenceDataModule, path, tokens_per_batch=900, val_fraction=share)

        path = stopped(data(0.05), tmp_path / "a.ckpt", after=3)
        with pytest.raises(AlignkitError, match=r"examples taken .*val_fraction 0\.05 → 0\.1"):
            train(data(0.1), resume=path)

    def test_what_changes_no_example_does_not_matter(
        self, data: Callable[..., Any], hh_dir: Path, tmp_path: Path, make: Callable[..., Any]
    ) -> None:
        """Another place, other spaces in the JSON, a limit that cuts nothing."""
        whole = train(data())
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        for split in ("train", "test"):
            lines = (hh_dir / f"{split}.jsonl").read_text().splitlines()
            text = "".join(
                json.dumps(json.loads(line), separators=(",", ":")) + "\n" for line in lines
            )
            (moved / f"{split}.jsonl").write_text(text)
        other = make(HHPreferenceDataModule, moved, tokens_per_batch=900, max_length=600)
        assert train(other, resume=path) == whole[3:]

    def test_between_epochs_anything_may_change_and_is_told(
        self,
        data: Callable[..., Any],
        hh_dir: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3, hook="on_train_epoch_end")
        rng = random.Random(7)
        write_jsonl(hh_dir / "train.jsonl", [pair(rng) for _ in range(80)])
        with caplog.at_level(logging.INFO, "alignkit.data"):
            seen = train(data(), resume=path)
        assert seen and {epoch for epoch, _ in seen} == {1}
        (told,) = [r.message for r in caplog.records if "the epoch begins with other" in r.message]
        assert "train.jsonl's content changed" in told and "\n" not in told

    @pytest.mark.parametrize("change", [{"tokens_per_batch": 500}, {"accumulate": 2}])
    def test_an_epoch_s_last_batch_is_its_end_whatever_the_next_epoch_s_length(
        self, data: Callable[..., Any], tmp_path: Path, change: dict[str, int]
    ) -> None:
        """Lightning took a shorter epoch for an unfinished one, and the next lost its beginning."""
        per_epoch = len(train(data())) // 2
        path = stopped(data(), tmp_path / "a.ckpt", after=per_epoch)
        accumulate = change.get("accumulate", 1)
        budget = {"tokens_per_batch": change.get("tokens_per_batch", 900)}
        whole = train(data(**budget), accumulate=accumulate)
        seen = train(data(**budget), resume=path, accumulate=accumulate)
        assert seen == [each for each in whole if each[0] == 1]

    def test_another_kind_of_data_is_refused(
        self, data: Callable[..., Any], hh_dir: Path, tmp_path: Path, make: Callable[..., Any]
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        other = make(HHSFTDataModule, hh_dir, tokens_per_batch=900)
        with pytest.raises(AlignkitError, match="no position in the data of a HHSFTDataModule"):
            train(other, resume=path)
        path = stopped(data(), tmp_path / "b.ckpt", after=3, hook="on_train_epoch_end")
        assert {epoch for epoch, _ in train(other, resume=path)} == {1}

    def test_fewer_rows_do_not_end_the_epoch(
        self, data: Callable[..., Any], hh_dir: Path, tmp_path: Path
    ) -> None:
        """A position beyond the end of a shorter file is still one in the middle of an epoch."""
        path = stopped(data(), tmp_path / "a.ckpt", after=4)
        lines = (hh_dir / "train.jsonl").read_text().splitlines(keepends=True)
        (hh_dir / "train.jsonl").write_text("".join(lines[:8]))
        with pytest.raises(AlignkitError, match="mid-epoch"):
            train(data(), resume=path)


class TestStream:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        rng = random.Random(5)
        rows = [{"text": sentence(rng, 5, 40)} for _ in range(40)]
        return write_jsonl(tmp_path / "owt.jsonl", rows)

    @pytest.fixture
    def data(self, file: Path, make: Callable[..., Any]) -> Callable[..., Any]:
        def build(**options: Any) -> Any:
            options = {"held_out": 10, "block_size": 32, "tokens_per_batch": 64, **options}
            return make(OpenWebTextDataModule, file, streaming=True, **options)

        return build

    @pytest.mark.parametrize("change", [permute, edit])
    def test_changed_text_is_refused(
        self, data: Callable[..., Any], file: Path, tmp_path: Path, change: Change
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        change(file)
        with pytest.raises(AlignkitError, match=r"owt\.jsonl's content changed \(digest .* → "):
            train(data(), resume=path, steps=40)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokens_per_batch": 96}, "tokens_per_batch 64 → 96"),
            ({"block_size": 16}, "block_size 32 → 16"),
            ({"packing": "best_fit"}, "packing concatenate → best_fit"),
            ({"held_out": 5}, "held_out 10 → 5"),
        ],
    )
    def test_changed_settings_are_refused(
        self, data: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        with pytest.raises(AlignkitError, match=message):
            train(data(**options), resume=path, steps=40)

    def test_no_stream_goes_on_as_epochs(
        self, data: Callable[..., Any], make: Callable[..., Any], file: Path, tmp_path: Path
    ) -> None:
        path = stopped(data(), tmp_path / "a.ckpt", after=3)
        other = make(OpenWebTextDataModule, file, block_size=32, tokens_per_batch=64)
        with pytest.raises(AlignkitError, match="streaming True → None"):
            train(other, resume=path, steps=40)


@pytest.mark.parametrize("plan", ["50 examples, 450 tokens, tokens_per_batch=50", None, {}])
def test_a_position_without_a_plan_is_refused_mid_epoch(plan: Any) -> None:
    sampler = TokenBudgetBatchSampler([9] * 50, 50)
    with pytest.raises(AlignkitError, match="does not say what data it saw"):
        sampler.load_state_dict({"epoch": 0, "batches": 2, "plan": plan})
    sampler.load_state_dict({"epoch": 0, "batches": 0, "plan": plan})


def test_lengths_in_another_order_are_another_plan() -> None:
    one, other = (TokenBudgetBatchSampler(lengths, 9).fingerprint for lengths in ([1, 2], [2, 1]))
    assert differences(one, one) == ""
    assert differences(one, other).startswith("lengths ")
