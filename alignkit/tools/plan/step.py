"""Run training steps on tensors without content, and count the bytes that live.

Shape letters: T row tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from alignkit.engine import Example, PackedBatch, collate
from alignkit.engine.attention import make_plan
from alignkit.engine.fallback import hidden_alone
from alignkit.engine.score import last_hidden_state
from alignkit.engine.tail import head_scores
from alignkit.errors import AlignkitError
from alignkit.tools.plan.model import Models
from alignkit.tools.plan.settings import Settings

PHASES = ("reference", "forward", "logits", "backward", "optimizer")
_LONGEST = 2048  # tokens of an example that is simulated; longer rows cost more time, not tokens


@dataclass(frozen=True)
class Measured:
    """Hold the bytes beside the weights that live during the second of two steps.

    Example:
        >>> Measured(tokens=512, peaks={"forward": 3, "backward": 4}, kept=2, gradients=1, states=1,
        ...          logits=1).peaks["backward"]
        4

    Attributes:
        tokens: Tokens of the row.
        peaks: The most during each phase.
        kept: Activations that the forward pass keeps for the backward pass.
        gradients: Gradients of what trains.
        states: The optimizer's states.
        logits: What the head takes while it scores a chunk.
    """

    tokens: int
    peaks: dict[str, int]
    kept: int
    gradients: int
    states: int
    logits: int


def row_of(settings: Settings, tokens: int) -> PackedBatch:
    """Return a row of about so many tokens, in examples as long as the data may have them.

    Half of an example's longest sequence is its prompt, where it has one.
    """
    longest = min(settings.longest, _LONGEST)
    prompt = longest // 2 if settings.prompted else 0
    answer = longest - prompt
    example = Example([0] * prompt, [[0] * answer] * settings.responses)
    size = prompt + answer * settings.responses
    return collate([example] * max(1, round(tokens / size)))


def measure_steps(settings: Settings, models: Models, batch: PackedBatch) -> Measured:
    """Run two steps of the run's kind on a batch, and return what lives during the second.

    Raises:
        AlignkitError: The model's layers choose shapes by values, which are not there.
    """
    live = LiveBytes(_tensors(models))
    make_plan.cache_clear()  # so that the row's layout is counted
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    with models.mode, live:
        optimizer = settings.optimizer(trained)
        for parameter in trained:  # of the step before
            parameter.grad = torch.empty_like(parameter)
        gradients = live.now
        try:
            optimizer.step()
            states = live.now - gradients
            kept, logits = _step(settings, models, batch, optimizer, live)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AlignkitError(
                f"plan: {type(models.policy).__name__} cannot be sized without its weights "
                f"({reason[:160]}); measure it with alignkit profile"
            ) from error
    for parameter in trained:
        parameter.grad = None
    return Measured(batch.num_tokens, live.peaks, kept, gradients, states, logits)


def _step(
    settings: Settings,
    models: Models,
    batch: PackedBatch,
    optimizer: Optimizer,
    live: LiveBytes,
) -> tuple[int, int]:
    """Take a step as Lightning does, and return the bytes of kept activations and of logits."""
    device = models.policy.device.type
    mixed = settings.mixed
    before = live.now
    with torch.autocast(device, mixed) if mixed is not None else nullcontext():
        if models.reference is not None:
            with live.phase("reference"), torch.inference_mode():
                hidden_ND = _hidden(models.reference, batch)
                head_scores(models.reference, hidden_ND, batch.target_ids)
                del hidden_ND
        with live.phase("forward"):
            hidden_ND = _hidden(models.policy, batch)
        between = live.now
        with live.phase("logits"):
            loss = head_scores(models.policy, hidden_ND, batch.target_ids).logps.sum()
            del hidden_ND
        kept = live.now - before
    logits = live.peaks["logits"] - between
    if not settings.accumulates:
        optimizer.zero_grad(set_to_none=True)
    with live.phase("backward"):
        torch.autograd.backward(loss)
        del loss
    with live.phase("optimizer"):
        gradients = [p.grad for p in models.policy.parameters() if p.grad is not None]
        nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, torch.ones((), device=gradients[0].device))
        del gradients
        optimizer.step()
    return kept, logits


def _hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    try:
        return last_hidden_state(model, batch)[batch.score_from]
    except AlignkitError:  # its attention does not take packed rows
        return hidden_alone(model, batch)


def _tensors(models: Models) -> Iterator[Tensor]:
    for model in filter(None, (models.policy, models.reference)):
        yield from model.parameters()
        yield from model.buffers()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors that live, but for those that were there before.

    Attributes:
        now: The bytes at the moment.
        peaks: The most during each phase.
    """

    def __init__(self, there: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._most = 0
        self._sizes: dict[int, int] = {}
        self._there = [tensor.untyped_storage() for tensor in there]
        for storage in self._there:
            self._sizes[storage._cdata] = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the most bytes that live within the context as the phase's peak."""
        self._most = self.now
        yield
        self.peaks[name] = max(self._most, self.peaks.get(name, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the storages that it has made."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.now += size
        self._most = max(self._most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
