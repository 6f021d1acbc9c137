"""The token ids that every arm trains on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.data import HHPreferenceDataModule, HHSFTDataModule, OpenWebTextDataModule
from alignkit.engine import Example
from alignkit.errors import AlignkitError
from sidebyside.job import Task
from sidebyside.options import Common

MAX_LENGTH = 512
# Mean and standard deviation of log token counts of harmless-base (GPT-2 BPE, 1,800 pairs):
# prompt, chosen, rejected. Padding random batches of 8 pairs costs 3.5 times the packed row,
# with these draws as with the real pairs.
_LOG_LENGTHS = ((4.45, 0.97), (3.38, 0.86), (3.57, 0.92))


def draw(
    task: Task, count: int, options: Common, tokenizer: str, vocabulary: int, tokens: int = 0
) -> list[Example]:
    """Take examples from the data a user named, or draw synthetic ones.

    Args:
        task: What they are for.
        count: How many.
        options: Name the data and the seed.
        tokenizer: For real data.
        vocabulary: For synthetic data.
        tokens: Of a row, in language modelling.

    Raises:
        AlignkitError: The data is missing or bad, or holds too few examples.
    """
    if options.data is None:
        if options.lengths is not None and task != "lm":
            return of_lengths(task, count, vocabulary, read_lengths(options.lengths), options.seed)
        return synthetic(task, count, vocabulary, tokens, options.seed)
    return real(task, count, options.data, tokenizer, tokens, options.seed)


def synthetic(task: Task, count: int, vocabulary: int, tokens: int, seed: int) -> list[Example]:
    """Draw random token ids in examples as long as HH-RLHF's; rows of ``tokens`` for lm."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return _ids(rng, vocabulary, length)

    if task == "lm":
        return [Example([], [ids(tokens)]) for _ in range(count)]
    examples = []
    while len(examples) < count:
        prompt, *responses = (
            max(2, round(float(rng.lognormal(mean, deviation)))) for mean, deviation in _LOG_LENGTHS
        )
        if prompt + max(responses) <= MAX_LENGTH:
            kept = responses[: 2 if task == "dpo" else 1]
            examples.append(Example(ids(prompt), [ids(length) for length in kept]))
    return examples


def of_lengths(
    task: Task, count: int, vocabulary: int, lengths: Sequence[Sequence[int]], seed: int
) -> list[Example]:
    """Draw random token ids in examples as long as real pairs; these come again where too few.

    Args:
        task: ``dpo`` takes both answers, ``sft`` the first.
        count: How many.
        vocabulary: Ids are below it.
        lengths: Tokens of each pair's prompt, chosen and rejected answer.
        seed: Of the order and the ids.
    """
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(lengths)) for _ in range(-(-count // len(lengths)))]
    )
    examples = []
    for index in order[:count]:
        prompt, *answers = lengths[int(index)]
        kept = answers if task == "dpo" else answers[:1]
        examples.append(
            Example(_ids(rng, vocabulary, prompt), [_ids(rng, vocabulary, n) for n in kept])
        )
    return examples


def read_lengths(path: str) -> list[list[int]]:
    """Read token counts: one JSON list of [prompt, chosen, rejected].

    Raises:
        AlignkitError: The file is missing or holds something else.
    """
    try:
        lengths = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise AlignkitError(f"--lengths {path}: cannot be read ({error})") from error
    if not isinstance(lengths, list) or not lengths or not all(map(_is_pair, lengths)):
        raise AlignkitError(f"--lengths {path}: holds no list of [prompt, chosen, rejected] counts")
    return lengths


def _is_pair(row: object) -> bool:
    counted = isinstance(row, list) and len(row) == 3
    return counted and all(type(count) is int and count > 0 for count in row)


def real(
    task: Task, count: int, path: str, tokenizer: str, tokens: int, seed: int
) -> list[Example]:
    """Take examples as alignkit's data modules make them, in random order.

    Raises:
        AlignkitError: The data is missing or bad, or holds too few examples.
    """
    modules: dict[Task, Callable[[], Any]] = {
        "dpo": lambda: HHPreferenceDataModule(tokenizer, path, max_length=MAX_LENGTH),
        "sft": lambda: HHSFTDataModule(tokenizer, path, max_length=MAX_LENGTH),
        "lm": lambda: OpenWebTextDataModule(tokenizer, path, block_size=tokens),
    }
    found = modules[task]().train_dataloader().dataset
    order = np.random.default_rng(seed).permutation(len(found))
    examples = []
    for index in order:
        example = found[int(index)]
        if task != "lm" or len(example.responses[0]) == tokens:
            examples.append(_plain(example))
        if len(examples) == count:
            return examples
    raise AlignkitError(
        f"--data {path}: holds {len(examples)} usable examples and {count} are needed; take fewer "
        "rounds or steps"
    )


def padded_length(example: Example) -> int:
    """Tokens of the example's longest row, once prompt and response are joined."""
    return len(example.prompt) + max(len(response) for response in example.responses)


def _ids(rng: np.random.Generator, vocabulary: int, length: int) -> list[int]:
    return rng.integers(1, vocabulary, length).tolist()  # type: ignore[no-any-return]


def _plain(example: Example) -> Example:
    return Example(_ints(example.prompt), [_ints(response) for response in example.responses])


def _ints(ids: Sequence[int] | NDArray[np.int32]) -> list[int]:
    return [int(token) for token in ids]
