"""Sums are float64 where a device has it, and nothing asks for it on one that has none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit.engine import Example
from alignkit.modules import DPOModule, KTOModule, RewardModule, SFTModule
from alignkit.modules.base import AlignmentModule
from alignkit.utils.exact import exact_dtype
from tests.modules.helpers import loader, pairs, sgd, trainer

_MADE = ("zeros", "empty", "new_empty", "clone", "copy_", "set_", "detach", "alias")
"""How a metric makes its first states, on the CPU."""


class WithoutFloat64(TorchDispatchMode):
    """Refuses what Apple's MPS refuses."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, and refuse its result in float64."""
        result = function(*args, **(kwargs or {}))
        wrong = [t for t in tree_leaves(result) if getattr(t, "dtype", None) == torch.float64]
        if wrong and function.overloadpacket.__name__ not in _MADE:
            raise TypeError(f"{function}: the device has no float64")
        return result


def test_mps_has_no_float64() -> None:
    assert exact_dtype(torch.device("cpu")) == exact_dtype(torch.device("cuda")) == torch.float64
    assert exact_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("kind", [SFTModule, DPOModule, KTOModule, RewardModule])
def test_training_and_validation_need_no_float64(
    kind: type[AlignmentModule],
    model_dir: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("alignkit.") and hasattr(module, "exact_dtype"):
            monkeypatch.setattr(module, "exact_dtype", lambda device: torch.float32)
    examples = pairs(8)
    if kind is KTOModule:
        examples = [replace(e, label=i % 2 == 0) for i, e in enumerate(examples)]
    if kind is SFTModule:
        examples = [Example(e.prompt, e.responses[:1]) for e in examples]
    made = kind(str(model_dir("llama")), optimizer=sgd, schedule="constant_with_warmup")
    run = trainer(tmp_path, max_epochs=1)
    with WithoutFloat64():
        run.fit(made, loader(examples, 4), loader(examples, 4))
    assert run.callback_metrics["val/loss"].isfinite()
