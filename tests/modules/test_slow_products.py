"""Training in bf16 on a CPU that has no instructions for it takes a day: one line says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import SFTModule
from alignkit.lora import LoRAConfig
from alignkit.modules import precision
from alignkit.tools.demo import run
from alignkit.utils import products
from tests.modules.helpers import answers, loader, trainer

ModelDir = Callable[[str], Path]
LINE = (
    "this CPU takes 70 times as long for products in bf16 as in fp32; add --trainer.precision "
    "32-true --model.dtype float32"
)


@pytest.mark.parametrize(
    ("precise", "dtype", "slowdown", "said"),
    [
        ("bf16-mixed", "float32", 70.0, True),
        ("32-true", "bfloat16", 70.0, True),
        ("bf16-true", "bfloat16", 70.0, True),
        ("32-true", "float32", 70.0, False),
        ("bf16-mixed", "bfloat16", 0.4, False),
    ],
)
def test_slow_products_are_said_once(
    model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precise: str,
    dtype: str,
    slowdown: float,
    said: bool,
) -> None:
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: slowdown)
    module = SFTModule(str(model_dir("llama")), lora=LoRAConfig(r=4), dtype=dtype)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "alignkit"):
        trainer(tmp_path, max_steps=1, precision=precise).fit(module, loader(answers(4), 2))
    assert caplog.text.count(LINE) == said


def test_times_of_equal_products_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([6.0, 5.0, 7.0, 2.0, 3.0, 2.5])
    monkeypatch.setattr(products, "_timed", lambda work: next(times))
    assert products.bf16_slowdown(8) == 2.5


@pytest.mark.parametrize(("slowdown", "dtype"), [(0.5, "bfloat16"), (2.0, "float32")])
def test_the_demo_trains_in_the_faster_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slowdown: float, dtype: str
) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str, options: list[str]) -> None:
        assert options[options.index("--model.dtype") + 1] == dtype
        raise Stopped

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(products, "bf16_slowdown", lambda size: slowdown)
    monkeypatch.setattr(run, "write_preferences", lambda folder: None)
    monkeypatch.setattr(run, "write_prose", lambda folder: None)
    monkeypatch.setattr(run, "fit", stop)
    with pytest.raises(Stopped):
        run.demo("some model")
