"""Define the batch of all three stages: prompts and responses, laid end to end in a flat row.

Shape letters: T row tokens, N scored tokens, E examples, R responses (all examples together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignkit.errors import AlignkitError


@dataclass(frozen=True)
class Example:
    """Hold a prompt and its k responses, as token ids.

    Example:
        >>> pair = Example(prompt=[11, 12], responses=[[13, 0], [14, 15, 0]])
        >>> pair.num_tokens
        7

    Attributes:
        prompt: Token ids every response continues; may be empty.
        responses: k ≥ 1 lists of token ids, the closing EOS included where there is one.
            Language modelling is an empty prompt with k = 1, SFT is k = 1, DPO is k = 2 with
            the chosen response first.
        scored: Which response tokens carry loss, one list of booleans per response, or
            ``None`` for all of them. Multi-turn SFT marks the assistant's turns here.
        label: Whether the first response is a good one, of unpaired rows.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    scored: Sequence[Sequence[bool]] | None = None
    label: bool | None = None

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the example takes in a row: its prompt once, every response."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


class Span(NamedTuple):
    """Hold an example's first index in the row, and its prompt's and its responses' lengths.

    Example:
        >>> Span(start=0, prompt=2, responses=(2, 3)).end
        7
    """

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end(self) -> int:
        """Return the index one past the example's last token."""
        return self.start + self.prompt + sum(self.responses)


def longest(spans: Sequence[Span]) -> int:
    """Return the length of the longest sequence of some spans: a prompt with one response."""
    return max(span.prompt + max(span.responses) for span in spans)


@dataclass(frozen=True)
class PackedBatch:
    """Hold examples as one flat row of segments, without padding.

    The row is ``prompt₀ response₀₀ response₀₁ … prompt₁ response₁₀ …``. A token attends to its own
    prompt and to the tokens before it in its own response. It attends to no other example and to no
    other response of its example.

    Example:
        >>> batch = collate([Example([11, 12], [[13, 0], [14, 15, 0]])])
        >>> batch.input_ids.tolist()
        [11, 12, 13, 0, 14, 15, 0]
        >>> batch.position_ids.tolist()
        [0, 1, 2, 3, 2, 3, 4]
        >>> batch.score_from.tolist(), batch.target_ids.tolist()
        ([1, 2, 1, 4, 5], [13, 0, 14, 15, 0])

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, 0…P-1 over a prompt, P… over each of its responses.
        score_from: [N] int64, the row index whose hidden state predicts the scored token. A
            response's first token is predicted from its prompt's last position; with an empty
            prompt it has no predictor and is not scored.
        target_ids: [N] int64, the scored tokens, example by example, response by response.
        response_index: [N] int64, the response (0…R-1 over the batch) each one belongs to.
        spans: one `Span` an example: plain ints, so that laying out attention never waits for
            a device.
        labels: [E] bool, `Example.label` where every example has one.
    """

    input_ids: Tensor
    position_ids: Tensor
    score_from: Tensor
    target_ids: Tensor
    response_index: Tensor
    spans: tuple[Span, ...]
    labels: Tensor | None = field(default=None, kw_only=True)

    @property
    def num_tokens(self) -> int:
        """Return T, the row's length."""
        return self.input_ids.numel()

    @property
    def num_scored(self) -> int:
        """Return N, the number of scored tokens."""
        return self.target_ids.numel()

    @property
    def num_examples(self) -> int:
        """Return E, the number of prompts."""
        return len(self.spans)

    @cached_property
    def num_responses(self) -> int:
        """Return R, the number of responses over all examples."""
        return sum(len(span.responses) for span in self.spans)

    @cached_property
    def longest(self) -> int:
        """Return the length of the longest sequence in tokens: a prompt with one response."""
        return longest(self.spans)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """Return the batch with its tensors on ``device``; the spans stay plain ints.

        A copy to a GPU does not wait by default, as waiting for it is waiting for every step
        before it. From memory that is not page-locked, CUDA reads the batch before it returns.
        """
        waits_not = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._map(lambda tensor: tensor.to(device, non_blocking=waits_not))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory, for copies that do not block the host."""
        return self._map(Tensor.pin_memory)

    def take(self, examples: Sequence[int]) -> PackedBatch:
        """Return a batch of some examples, by their indices in order, of a batch on the CPU."""
        rows, scored, spans, responses = [], [], [], []
        first_response = [0, *accumulate(len(span.responses) for span in self.spans)]
        bounds = torch.searchsorted(self.response_index, torch.tensor(first_response)).tolist()
        start = 0
        for index in examples:
            span = self.spans[index]
            rows.append(torch.arange(span.start, span.end))
            scored.append(torch.arange(bounds[index], bounds[index + 1]))
            spans.append(span._replace(start=start))
            responses.append(len(span.responses))
            start += span.end - span.start
        row_T, scored_N = torch.cat(rows), torch.cat(scored)
        counts = torch.tensor([len(part) for part in scored])

        def moved(values_N: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
            shift = torch.tensor(new) - torch.tensor(old)
            return values_N + shift.repeat_interleave(counts)

        return PackedBatch(
            input_ids=self.input_ids[row_T],
            position_ids=self.position_ids[row_T],
            score_from=moved(
                self.score_from[scored_N],
                [self.spans[index].start for index in examples],
                [span.start for span in spans],
            ),
            target_ids=self.target_ids[scored_N],
            response_index=moved(
                self.response_index[scored_N],
                [first_response[index] for index in examples],
                [0, *accumulate(responses)][:-1],
            ),
            spans=tuple(spans),
            labels=None if self.labels is None else self.labels[list(examples)],
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changes[name] = function(value)
            elif isinstance(value, PackedBatch):
                changes[name] = value._map(function)
        return replace(self, **changes)


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end in one row.

    Args:
        examples: At least one example; prompts may be empty, responses may not.

    Returns:
        The batch on the CPU.

    Raises:
        AlignkitError: No examples, an example without responses, an empty response, or a
            ``scored`` mask of another length than its response.
    """
    if not examples:
        raise AlignkitError("collate: no examples given; a batch holds at least one")
    segments: list[NDArray[np.int64]] = []
    bases: list[int] = []  # position of each segment's first token
    firsts: list[int] = []  # row index of each response's first token, and what predicts it
    before: list[int] = []
    flags: list[NDArray[np.bool_]] = []  # per segment: which tokens are scored
    spans: list[Span] = []
    end = 0
    for index, example in enumerate(examples):
        _check_example(index, example)
        start, prompt = end, len(example.prompt)
        segments.append(np.asarray(example.prompt, np.int64))
        bases.append(0)
        flags.append(np.zeros(prompt, np.bool_))
        end += prompt
        for k, response in enumerate(example.responses):
            scored = example.scored[k] if example.scored is not None else True
            flags.append(np.full(len(response), scored, np.bool_))
            flags[-1][0] &= prompt > 0  # without a prompt nothing predicts the first token
            segments.append(np.asarray(response, np.int64))
            bases.append(prompt)
            firsts.append(end)
            before.append(start + prompt - 1)
            end += len(response)
        spans.append(Span(start, prompt, tuple(len(r) for r in example.responses)))
    lengths = np.array([len(segment) for segment in segments])
    row = np.arange(end)
    starts = np.cumsum(lengths) - lengths
    predictors = row - 1
    predictors[firsts] = before
    scored_N = np.flatnonzero(np.concatenate(flags))
    input_ids = np.concatenate(segments)
    responses = np.searchsorted(firsts, scored_N, side="right") - 1
    labels = [example.label for example in examples]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(row - np.repeat(starts - bases, lengths)),
        score_from=torch.from_numpy(predictors[scored_N]),
        target_ids=torch.from_numpy(input_ids[scored_N]),
        response_index=torch.from_numpy(responses.astype(np.int64)),
        spans=tuple(spans),
        labels=None if None in labels else torch.tensor(labels),
    )


def _check_example(index: int, example: Example) -> None:
    if not example.responses:
        raise AlignkitError(f"collate: example {index} has no responses; give it at least one")
    for k, response in enumerate(example.responses):
        if len(response) == 0:
            raise AlignkitError(f"collate: example {index}, response {k} is empty; end it with EOS")
        if example.scored is not None and len(example.scored[k]) != len(response):
            raise AlignkitError(
                f"collate: example {index}, response {k} has {len(response)} tokens but its "
                f"scored mask has {len(example.scored[k])}; give one boolean a token"
            )
