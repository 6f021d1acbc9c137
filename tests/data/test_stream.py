"""Text read as training goes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest

from alignkit.data import OpenWebTextDataModule
from alignkit.data.deal.stream import ExampleStream, head, tail
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Tally
from alignkit.engine import Example
from alignkit.errors import AlignkitError
from tests.data.conftest import sentence, write_jsonl
from tests.data.test_resume import Recorder, SaveAndStop, quiet


def lines(count: int) -> Source:
    return Source("rows", "0", lambda: ((i, {"text": str(i)}) for i in range(1, count + 1)))


def encode(source: Source, tally: Tally) -> Any:
    for line, row in source.rows():
        tally.add("examples", line)
        yield line, Example([], [[int(row["text"])] * 3])


def shown(stream: ExampleStream, batches: int) -> list[int]:
    return [
        token
        for batch in itertools.islice(stream, batches)
        for token in batch.input_ids[::3].tolist()
    ]


def test_ranks_share_the_rows_and_start_over() -> None:
    """Ten rows of three tokens, two a batch, over two ranks: 2 4 6 8 10, then again."""
    streams = [
        ExampleStream([lines(10)], encode, tokens_per_batch=6, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert shown(streams[0], 4) == [2, 4, 6, 8, 10, 2, 4, 6]
    assert shown(streams[1], 4) == [1, 3, 5, 7, 9, 1, 3, 5]


def test_skipping_is_where_it_stopped() -> None:
    whole = shown(ExampleStream([lines(7)], encode, tokens_per_batch=6), 9)
    for skip in range(9):
        stream = ExampleStream([lines(7)], encode, tokens_per_batch=6, skip=skip)
        assert shown(stream, 9 - skip) == whole[2 * skip :]


def test_head_and_tail_part_the_rows() -> None:
    assert [line for line, _ in head(lines(9), 4).rows()] == [1, 2, 3, 4]
    assert [line for line, _ in tail(lines(9), 4).rows()] == [5, 6, 7, 8, 9]


def test_an_empty_stream_ends_with_a_line() -> None:
    with pytest.raises(AlignkitError, match="rows: the stream holds no example"):
        next(iter(ExampleStream([tail(lines(3), 3)], encode, tokens_per_batch=6)))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    rng = random.Random(5)
    return write_jsonl(tmp_path / "owt.jsonl", [{"text": sentence(rng, 5, 40)} for _ in range(40)])


def run(data: Any, steps: int, *callbacks: Any, resume: Path | None = None) -> list[Any]:
    module = Recorder()
    trainer = quiet(max_steps=steps, max_epochs=-1, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_trains_past_the_end_and_resumes(
    text_file: Path, make: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    def data() -> OpenWebTextDataModule:
        return make(
            OpenWebTextDataModule,
            text_file,
            streaming=True,
            held_out=10,
            block_size=32,
            tokens_per_batch=64,
            num_workers=workers,
        )

    whole = run(data(), 40)
    per_pass = next(i for i in range(5, 39) if whole[i] == whole[0])
    assert whole[per_pass : per_pass + 2] == whole[:2], "the next pass begins the same"
    path = tmp_path / "a.ckpt"
    with pytest.raises(SystemExit):
        run(data(), 40, SaveAndStop(per_pass + 3, path, "on_train_batch_end"))
    assert run(data(), 40, resume=path) == whole[per_pass + 3 :]
    held_out = {tuple(batch.input_ids.tolist()) for batch in data().val_dataloader()}
    assert held_out and held_out.isdisjoint(ids for _, ids in whole)


def test_a_stream_needs_an_end(text_file: Path, make: Callable[..., Any]) -> None:
    data = make(OpenWebTextDataModule, text_file, streaming=True, held_out=10, block_size=32)
    trainer = lightning.Trainer(max_epochs=1, logger=False, accelerator="cpu")
    data.trainer = trainer
    with pytest.raises(AlignkitError, match="a stream is one endless epoch"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"examples_per_batch": 4}, "data.examples_per_batch"),
        ({"max_train_examples": 4}, "data.max_train_examples"),
        ({"path": {"a.jsonl": 1.0, "b.jsonl": 0.1}}, "data.path with weights"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    options: dict[str, Any], name: str, text_file: Path, make: Callable[..., Any]
) -> None:
    path = options.pop("path", text_file)
    with pytest.raises(AlignkitError, match=f"{name}: does not go with data.streaming"):
        make(OpenWebTextDataModule, path, streaming=True, **options)
