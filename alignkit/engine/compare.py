"""Compare scores of a few tokens with those of the model's own forward, one sequence at a time.

The model computes both in fp32, with logits scaled up to a wide spread. In half precision its
scores must be about as near to fp32 as those of its own forward.

Shape letters: N scored tokens, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.batch import Example, PackedBatch, collate
from alignkit.engine.fp32 import in_fp32
from alignkit.engine.interface import backbone, use_own_attention
from alignkit.engine.lengths import text_config
from alignkit.errors import AlignkitError
from alignkit.utils.autocast import HALF

Score = Callable[[PreTrainedModel, PackedBatch], Tensor]

COMPARED_TOKENS = 64
"""How many of the last tokens of a long sequence are compared."""
LEAST_SPREAD = 10.0
"""Least spread of the compared logits in nats, at which a soft-cap shows as after training."""
TOLERANCE = 1e-4
"""Largest difference of scores in fp32, as a share of the spread of the logits."""


def comparison_examples(model: PreTrainedModel, longest: int, limit: int | None) -> list[Example]:
    """Build short examples, and one with a sequence of ``longest`` tokens if that is longer.

    Args:
        model: Whose vocabulary the token ids come from.
        longest: Tokens of the longest sequence.
        limit: Most tokens that a sequence may have; ``None`` for any number.
    """
    vocabulary = text_config(model).vocab_size
    count = max(longest, 24)
    ids = [(37 * i + 11) % vocabulary for i in range(count)]
    half = 9 if limit is None else max(1, min(9, limit // 2))
    examples = [
        Example(ids[:half], [ids[half : half + 6][:half], ids[half + 6 : half + 15][:half]]),
        Example(ids[20:21], [ids[1:3]]),
        Example([], [ids[3 : 3 + half]]),
    ]
    if longest > 2 * half:
        middle = longest // 2
        last = [False] * (longest - middle)
        last[-COMPARED_TOKENS:] = [True] * len(last[-COMPARED_TOKENS:])
        near = ids[5:9]
        examples.append(
            Example(ids[:middle], [ids[middle:longest], near], [last, [True] * len(near)])
        )
    return examples


def find_fault(
    model: PreTrainedModel, score: Score, examples: list[Example], looks_ahead: bool = False
) -> str | None:
    """Compare scores with the model's own, one sequence at a time.

    In fp32 they must agree up to rounding. In half precision they must be about as near to fp32 as
    the model's own scores are.

    Args:
        model: On any device, in any mode. Neither changes.
        score: Returns the log-probs of a batch, [N].
        examples: From `comparison_examples`.
        looks_ahead: Whether to check that the model's own scores do not depend on later tokens.

    Returns:
        A description of the fault, or ``None`` where there is none.

    Raises:
        AlignkitError: The model's own scores are no numbers.
    """
    device = model.device
    batch = collate(examples).to(device)
    half_precision = backbone(model).dtype in HALF
    with torch.no_grad(), _in_eval_mode(model), _with_wide_logits(model, examples[1]):
        with in_fp32(model, device):
            truth, spread = _own_scores(model, examples, device)
            if not truth.isfinite().all():
                raise AlignkitError(
                    f"model: {type(model).__name__} itself scores NaN or infinity, although its "
                    "weights are numbers: they are damaged or too large; use another base or start"
                )
            if looks_ahead:
                if not _agree(_own_scores(model, examples, device)[0], truth, spread):
                    return "its own scores differ from one forward to the next"
                if _depends_on_later_tokens(model, examples[0], spread):
                    return "its tokens depend on those that follow them"
            scores = _score_or_fault(model, score, batch)
        if isinstance(scores, str):
            return scores
        if not _agree(scores, truth, spread):
            difference = (scores - truth).abs().max().item()
            return f"scores are off by {difference:.2g} nats (logits spread {spread:.2g})"
        if not half_precision:
            return None
        rounded = _score_or_fault(model, score, batch)
        if isinstance(rounded, str):
            return rounded
        plain, _ = _own_scores(model, examples, device)
        fault = _rounding_fault(rounded - truth, plain - truth, batch.response_index)
        dtype = str(backbone(model).dtype).removeprefix("torch.")
        return fault and f"in {dtype} {fault} of the model's own scores"


def _score_or_fault(model: PreTrainedModel, score: Score, batch: PackedBatch) -> Tensor | str:
    """Score a batch, or return a description of why that fails."""
    try:
        return score(model, batch)
    except torch.OutOfMemoryError:
        raise
    except AlignkitError as error:
        return str(error).removeprefix("model: ").partition("; ")[0]
    except Exception as error:  # transformers' models raise many kinds of errors over a row
        return f"the forward fails ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    """Return an error's class and its first line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first}"


def _agree(scores_N: Tensor, truth_N: Tensor, spread: float) -> bool:
    return bool((scores_N - truth_N).abs().max() <= TOLERANCE * spread)


def _depends_on_later_tokens(model: PreTrainedModel, example: Example, spread: float) -> bool:
    """Check whether the scores of a sequence change when its last tokens do."""
    tokens = [*example.prompt, *example.responses[-1]]
    half = len(tokens) // 2
    other = [*tokens[:half], *reversed(tokens[half:])]
    shared = [True] * (half - 1) + [False] * (len(tokens) - half)
    pair = [Example(tokens[:1], [each[1:]], [shared]) for each in (tokens, other)]
    scores, _ = _own_scores(model, pair, model.device)
    first, second = scores.chunk(2)
    return not _agree(second, first, spread)


def _rounding_fault(packed_N: Tensor, plain_N: Tensor, response_N: Tensor) -> str | None:
    """Find out whether rounding harms packed scores more than the model's own scores.

    Single tokens, their median, the sums of responses and the mean are compared. A change of its
    last bit may send a token to another expert of a router, which makes an error of any size. An
    error therefore counts for at most five times the usual one.

    Args:
        packed_N, plain_N: Errors of both against fp32.
        response_N: The response that each token belongs to.

    Returns:
        A description of what is worse, or ``None``. The margins are too wide for chance to reach.
    """
    noise = 1.5 * plain_N.abs().median().item() + 1e-6
    errors = [
        errors_N.nan_to_num(math.inf).clamp(-5 * noise, 5 * noise)
        for errors_N in (packed_N, plain_N)
    ]
    rms, own_rms = (errors_N.square().mean().sqrt().item() for errors_N in errors)
    if rms > 3 * own_rms + 1e-6:
        return (
            f"rounding errors of {rms:.2g} nats a token are more than three times the {own_rms:.2g}"
        )
    middle, own_middle = (errors_N.abs().median().item() for errors_N in (packed_N, plain_N))
    if middle > 6 * own_middle + 1e-6:  # a few large errors of its own hide this from the above
        return f"median errors of {middle:.2g} nats a token are far beyond the {own_middle:.2g}"
    mean, own_mean = (errors_N.mean().item() for errors_N in errors)
    if abs(mean) > abs(own_mean) + 5 * noise / math.sqrt(len(plain_N)):
        return f"mean errors of {mean:+.2g} nats are far beyond the {own_mean:+.2g}"
    counts_R = torch.bincount(response_N)
    sums_R, own_R = (
        errors_N.new_zeros(len(counts_R)).index_add(0, response_N, errors_N) for errors_N in errors
    )
    if (sums_R.abs() > own_R.abs().max() + 5 * noise * counts_R.sqrt()).any():
        return f"sums are off by {sums_R.abs().max().item():.2g} nats, far beyond the rounding"
    return None


def _own_scores(
    model: PreTrainedModel, examples: list[Example], device: torch.device
) -> tuple[Tensor, float]:
    """Score each response in a forward of its own, as transformers computes it.

    Returns:
        [N] fp32 log-probs in the order of a batch, and the mean spread of the logits over V.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    scores, spreads = [], []
    with _with_own_attention(model):
        for example in examples:
            for k, response in enumerate(example.responses):
                scored = example.scored[k] if example.scored else [True] * len(response)
                wanted = [
                    len(example.prompt) + j
                    for j, taken in enumerate(scored)
                    if taken and len(example.prompt) + j
                ]
                row = torch.tensor([[*example.prompt, *response]], device=device)
                # Keep the last logits alone, from the one that predicts the first token wanted.
                kept = row.shape[1] - wanted[0] + 1
                more = {"logits_to_keep": kept} if keeps else {}
                logits_LV = model(row, use_cache=False, **more).logits[0, -kept:].float()
                predictors = torch.tensor(wanted, device=device) - (row.shape[1] - kept) - 1
                logits_NV = logits_LV[predictors]
                targets_N1 = row[0, wanted][:, None]
                scores.append(logits_NV.log_softmax(-1).gather(1, targets_N1)[:, 0])
                spreads.append(logits_NV.std(-1).mean())
    return torch.cat(scores), torch.stack(spreads).mean().item()


@contextmanager
def _with_own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Set transformers' own attention for a while, without our function in between."""
    before = model.config._attn_implementation
    use_own_attention(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _with_wide_logits(model: PreTrainedModel, example: Example) -> Iterator[None]:
    """Scale the last hidden states until logits spread by `LEAST_SPREAD`, if they spread by less.

    Both ways of scoring go through the same decoder, so that they stay comparable.
    """
    with in_fp32(model, model.device):
        _, spread = _own_scores(model, [example], model.device)
    factor = max(1.0, LEAST_SPREAD / spread) if spread > 0 else 1.0

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    # Hook the innermost model that makes hidden states, since some heads call it directly.
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        decoder = backbone(model)
    handle = decoder.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
