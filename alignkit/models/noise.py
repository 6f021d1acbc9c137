"""Check that a base without dropout draws nothing, and scores in training as in evaluation mode.

`alignkit.models.dropout` finds probabilities by their names and sets them to zero. This check finds
any other noise by its effect, and scores one row several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from alignkit.engine import Example, collate, score
from alignkit.errors import AlignkitError
from alignkit.lora.adapter import adapter_layers
from alignkit.models.dropout import zeroed

# Largest difference in nats a token between training and evaluation mode, whose kernels may differ.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 2e-2
_BELOW_ONE = 1 - 2**-24
_UNIFORM_DRAWS = ("rand", "rand_like", "uniform", "uniform_")
_BERNOULLI_DRAWS = ("bernoulli", "bernoulli_")


@contextmanager
def adapters_quiet(model: nn.Module) -> Iterator[None]:
    """Set the adapters' dropout off for a while, and nothing else, in any mode of the model."""
    layers = [layer for layer in adapter_layers(model).values() if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


@torch.no_grad()
def refuse_noise(model: PreTrainedModel) -> None:
    """Refuse a base that draws random numbers in training mode which change a score.

    One row is scored in evaluation and twice in training mode, with the dropout of adapters off.
    A single number is usually drawn for a comparison with a probability (layer drop). It is
    replaced by 0 in one run and by nearly 1 in the other, so that any probability shows. Many
    numbers at once (jitter, a router that samples) are always refused, since they may matter on
    another row.

    A probability that evaluation reads too is part of the function and no noise (PhiMoE's
    ``router_jitter_noise``). The value that `zero_dropout` replaced is then restored.

    Args:
        model: A base after `zero_dropout` and `alignkit.engine.check_engine`, with or without
            adapters. It keeps its mode.

    Raises:
        AlignkitError: Scores differ. The line names the module that makes the difference.
    """
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    try:
        with torch.random.fork_rng(devices):
            _restore_read_in_evaluation(model)
            evaluated = _WatchedScoring(model, training=False)
            low, high = (_WatchedScoring(model, end=end) for end in (0.0, _BELOW_ONE))
            if low.noisy or not low.near(high, 0.0 if low.drew else tolerance):
                _refuse_noisy_module(model, "draws random numbers in training mode", end=_BELOW_ONE)
            if not low.near(evaluated, tolerance):
                _refuse_noisy_module(
                    model, "computes something else in training mode", training=False
                )
    finally:
        model.train(was_training)


def _refuse_noisy_module(model: PreTrainedModel, what: str, **other: Any) -> None:
    """Refuse the model, naming the first module that draws, or that differs in another run."""
    run, other_run = _WatchedScoring(model, watch=True), _WatchedScoring(model, watch=True, **other)
    parting = (
        mine[0]
        for mine, theirs in zip(run.events, other_run.events, strict=False)
        if mine != theirs
    )
    culprit = run.noisy or next(parting, type(model).__name__)
    raise AlignkitError(
        f"model.dropout=false: {culprit} of {type(model).__name__} {what}, so that its scores "
        "would not be the ones it has in evaluation; set model.dropout to true to train it as it "
        "is, or use another base"
    )


def _restore_read_in_evaluation(model: PreTrainedModel) -> None:
    """Restore the probabilities that change a score in evaluation mode too.

    The ``p`` of torch's own dropout classes is not tried, since evaluation never reads it.
    """
    suspects = [each for each in zeroed(model) if not isinstance(each.holder, _DropoutNd)]
    if not suspects:
        return
    quiet = _WatchedScoring(model, training=False)

    def changes(names: Sequence[str]) -> bool:
        # A value of 0.5 changes scores by more than rounding where it is read.
        chosen = [each for each in suspects if each.name in names]
        for each in chosen:
            each.set(0.5)
        loud = _WatchedScoring(model, training=False)
        for each in chosen:
            each.set(0.0)
        return not quiet.near(loud, 0.0)

    every = sorted({each.name for each in suspects})
    if not changes(every):
        return
    read = [name for name in every if changes([name])]
    for each in suspects:
        if each.name in read:
            each.set(each.value)
    zeroed(model)[:] = [e for e in zeroed(model) if e not in suspects or e.name not in read]


class _WatchedScoring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Score one row of two examples once, and record the random numbers that are drawn.

    Args:
        model: The model that scores.
        training: Its mode; adapters are always in evaluation mode.
        end: Replaces every uniform number that is drawn alone.
        watch: Whether to keep ``events``.

    Attributes:
        logps_N: The scores.
        drew: Whether any random number was drawn.
        noisy: The module that drew many different ones at once, or an empty string.
        events: What every module received and returned, in order: the name of the module whose
            code made the tensors, and a digest of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        training: bool = True,
        end: float = 0.0,
        watch: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = False
        self.noisy = ""
        self.events: list[tuple[str, int]] = []
        self._end = end
        self._inside = [type(model).__name__]
        vocabulary = model.config.get_text_config().vocab_size
        ids = [(37 * i + 11) % vocabulary for i in range(24)]
        batch = collate([Example(ids[:9], [ids[9:15], ids[15:24]]), Example([], [ids[3:12]])])
        model.train(training)
        with self._watching(model if watch else None), adapters_quiet(model), self:
            self.logps_N = score(model, batch.to(model.device))

    def near(self, other: _WatchedScoring, tolerance: float) -> bool:
        """Tell whether no score differs by more than the tolerance; NaN always does."""
        return bool((self.logps_N - other.logps_N).abs().max() <= tolerance)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, record whether it drew random numbers, and replace one drawn alone."""
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **(kwargs or {}))
        before = _random_state(args)
        result = function(*args, **(kwargs or {}))
        if torch.equal(_random_state(args), before):  # attention without dropout draws nothing
            return result
        self.drew = True
        name = function.overloadpacket.__name__
        if not isinstance(result, Tensor) or not (result == result.flatten()[0]).all():
            self.noisy = self.noisy or self._inside[-1]
        elif result.numel() == 1 and name in _UNIFORM_DRAWS:
            result.fill_(self._end)
        elif result.numel() == 1 and name in _BERNOULLI_DRAWS:
            result.fill_(round(self._end))
        return result

    @contextmanager
    def _watching(self, model: nn.Module | None) -> Iterator[None]:
        hooks: list[Any] = []

        def watch(module: nn.Module, name: str) -> None:
            def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
                # The module around this one made the input.
                self.events.append((self._inside[-1], _digest((args, kwargs))))
                self._inside.append(f"{type(module).__name__} ({name})")

            def leave(_: nn.Module, args: Any, output: Any) -> None:
                self.events.append((self._inside.pop(), _digest(output)))

            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))

        for name, module in model.named_modules() if model is not None else ():
            if name:
                watch(module, name)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _random_state(args: Sequence[Any]) -> Tensor:
    """Return the state of the generator that an operator over these arguments would use."""
    devices = [arg.device for arg in args if isinstance(arg, Tensor)]
    if devices and devices[0].type == "cuda":
        return torch.cuda.get_rng_state(devices[0])
    return torch.get_rng_state()


def _digest(value: Any) -> int:
    """Return a number that equal nests of floating-point tensors share."""
    # Placeholders for masks are integers without meaning.
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    flat = [t.detach().cpu().contiguous().view(-1) for t in tensors if t.is_floating_point()]
    return hash(tuple(tensor.view(torch.uint8).numpy().tobytes() for tensor in flat))
