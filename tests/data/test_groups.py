"""Micro-batches that come with the longer row a reference is scored in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from alignkit.data import HHPreferenceDataModule
from alignkit.engine import PackedBatch, collate
from alignkit.engine.group import GroupedBatch, collate_group
from alignkit.errors import AlignkitError
from tests.data.test_resume import Recorder, SaveAndStop, quiet
from tests.modules.helpers import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def same(left: PackedBatch, right: PackedBatch) -> bool:
    tensors = ("input_ids", "position_ids", "score_from", "target_ids", "response_index")
    return left.spans == right.spans and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def test_a_group_is_its_micro_batches_and_the_row_of_all() -> None:
    examples = pairs(6)
    parts = [examples[:3], examples[3:4], examples[4:]]
    group = collate_group(parts)
    batches = list(group.batches())
    assert all(same(batch, collate(part)) for batch, part in zip(batches, parts, strict=True))
    assert [batch.first_R for batch in batches] == [0, 6, 8]
    assert [batch.group is None for batch in batches] == [False, True, True]
    assert batches[0].group is not None
    assert same(batches[0].group, collate(examples))
    later = list(group.batches(skip=1))
    assert [batch.first_R for batch in later] == [6, 8]
    assert later[0].group is not None
    assert same(later[0].group, collate(examples))


def test_moving_a_batch_moves_its_row() -> None:
    (batch,) = collate_group([pairs(2)]).batches()
    moved = batch.to("meta")
    assert moved.input_ids.is_meta
    assert moved.group is not None
    assert moved.group.target_ids.is_meta


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_groups_change_no_batch(hh_dir: Path, make: Callable[..., Any], workers: int) -> None:
    def batches(**options: Any) -> list[PackedBatch]:
        data = make(HHPreferenceDataModule, hh_dir, tokens_per_batch=700, **options)
        loader = data.train_dataloader()
        found = list(loader)
        assert len(loader) == len(found)
        return found

    plain = batches()
    grouped = batches(reference_tokens_per_batch=2199, num_workers=workers)
    assert len(plain) >= 5
    assert all(same(left, right) for left, right in zip(plain, grouped, strict=True))
    for number, batch in enumerate(grouped):
        assert isinstance(batch, GroupedBatch)
        members = plain[number : number + 3]
        if number % 3:
            assert batch.group is None
            continue
        assert batch.group is not None
        assert batch.group.num_tokens <= 2199
        ids = torch.cat([member.input_ids for member in members])
        assert torch.equal(batch.group.input_ids, ids)


def test_room_for_one_micro_batch_makes_no_groups(hh_dir: Path, make: Callable[..., Any]) -> None:
    data = make(
        HHPreferenceDataModule, hh_dir, tokens_per_batch=700, reference_tokens_per_batch=1399
    )
    assert not any(isinstance(batch, GroupedBatch) for batch in data.train_dataloader())


def test_less_room_than_the_policy_is_refused(hh_dir: Path, make: Callable[..., Any]) -> None:
    with pytest.raises(AlignkitError, match=r"reference_tokens_per_batch=512: .*=4096"):
        make(HHPreferenceDataModule, hh_dir, reference_tokens_per_batch=512)


class RowRecorder(Recorder):
    """Remembers for every batch the row that a reference scores it in."""

    row: tuple[int, ...] = ()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, GroupedBatch)
        if batch.group is not None:
            self.row = tuple(batch.group.input_ids.tolist())
        self.seen.append(
            (self.current_epoch, (batch.first_R, *batch.input_ids.tolist(), *self.row))
        )
        return self.weight * 0.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_scores_in_the_rows_it_would_have_had(
    hh_dir: Path, make: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    """Other neighbours in a row would change a sum's rounding, and so the run."""

    def run(*callbacks: Any, resume: Path | None = None) -> list[Any]:
        data = make(
            HHPreferenceDataModule,
            hh_dir,
            tokens_per_batch=900,
            reference_tokens_per_batch=2700,
            num_workers=workers,
        )
        module = RowRecorder()
        trainer = quiet(max_epochs=2, callbacks=list(callbacks))
        with contextlib.suppress(SystemExit):  # how Lightning ends after an interrupt
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module.seen

    whole = run()
    assert len(whole) >= 8
    for after in range(1, len(whole)) if not workers else (2, 5):
        path = tmp_path / f"{after}.ckpt"
        before = run(SaveAndStop(after, path, "on_train_batch_end"))
        assert before + run(resume=path) == whole, f"after {after} of {len(whole)}"


def test_overfitting_keeps_the_groups(hh_dir: Path, make: Callable[..., Any]) -> None:
    """Lightning exchanges the sampler of a loader it thinks random."""
    data = make(
        HHPreferenceDataModule, hh_dir, tokens_per_batch=700, reference_tokens_per_batch=1400
    )
    module = RowRecorder()
    trainer: lightning.Trainer = quiet(max_epochs=2, overfit_batches=3)
    trainer.fit(module, datamodule=data)
    assert len(module.seen) == 6
    assert [ids for _, ids in module.seen[:3]] == [ids for _, ids in module.seen[3:]]
