"""Every precision of Lightning trains to the fp32 losses, or says which one to use."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from transformers import PreTrainedModel

from alignkit.engine import Example, collate
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule, SFTModule
from alignkit.modules.base import AlignmentModule
from alignkit.modules.reference_cache import ReferenceCache
from tests.modules.helpers import answers, loader, pairs, trainer

ADAPTED = LoRAConfig(targets="all-linear")

pytestmark = [
    # Lightning's own advice on names it has deprecated, and on fp16 on a CPU.
    pytest.mark.filterwarnings("ignore:.*is supported for historical reasons"),
    pytest.mark.filterwarnings("ignore:You passed .*AMP with fp16 is not supported on CPU"),
]


@pytest.fixture
def wide_dir(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[[str], Path]:
    """Like ``model_dir``, with weights so wide that its predictions are far from uniform."""

    def make(family: str) -> Path:
        directory = tmp_path / f"wide_{family}"
        tiny_model(family).save_pretrained(directory)
        return directory

    return make


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def long_examples(stage: type[AlignmentModule]) -> list[Example]:
    """Rows of hundreds of positions, where a rounded rotary frequency is plain to see."""
    examples = pairs(6) if stage is DPOModule else answers(6)
    return [Example([*e.prompt * 30][:300], e.responses) for e in examples]


def losses(
    base: Path, stage: type[AlignmentModule], directory: Path, module: dict, **options: Any
) -> tuple[AlignmentModule, list[float]]:
    """Three steps' losses, then the validation loss after them."""
    torch.manual_seed(1)
    made = stage(
        str(base), optimizer=adamw, schedule="constant_with_warmup", **{"lora": ADAPTED, **module}
    )
    logged: list[float] = []
    log = made._log

    def keep(name: str, value: Any, **kwargs: Any) -> None:
        logged.extend([float(value)] if name == "train/loss" else [])
        log(name, value, **kwargs)

    made._log = keep  # type: ignore[method-assign]
    batches = loader(long_examples(stage), 2)
    run = trainer(directory, max_steps=3, gradient_clip_val=1.0, **options)
    run.fit(made, batches, batches)
    return made, [*logged, float(run.callback_metrics["val/loss"])]


# The largest error of a loss in nats, and the dtypes of the base and of what trains.
EXPECTED = {
    "32-true": (0.0, torch.float32, torch.float32),
    "32": (0.0, torch.float32, torch.float32),
    "64-true": (1e-4, torch.float64, torch.float64),
    "64": (1e-4, torch.float64, torch.float64),
    "16-true": (0.02, torch.float16, torch.float32),
    "bf16-true": (0.1, torch.bfloat16, torch.float32),
    "bf16-mixed": (0.1, torch.float32, torch.float32),
    "bf16": (0.1, torch.float32, torch.float32),
    "16-mixed": (0.1, torch.float32, torch.float32),
    "16": (0.1, torch.float32, torch.float32),
}


IN_FP32: dict[type[AlignmentModule], list[float]] = {}
"""What the others are held against, measured once."""


@pytest.mark.parametrize("stage", [SFTModule, DPOModule])
@pytest.mark.parametrize("precision", EXPECTED)
def test_losses_are_those_of_fp32(
    wide_dir: Callable[[str], Path], tmp_path: Path, precision: str, stage: type[AlignmentModule]
) -> None:
    """Adapters and their optimizer's state are never kept in half precision."""
    tolerance, base, adapters = EXPECTED[precision]
    if stage not in IN_FP32:
        IN_FP32[stage] = losses(wide_dir("llama"), stage, tmp_path, {}, precision="32-true")[1]
    expected = IN_FP32[stage]
    module, actual = losses(wide_dir("llama"), stage, tmp_path, {}, precision=precision)
    assert actual == pytest.approx(expected, abs=tolerance)
    assert abs(actual[-1] - actual[0]) > 10 * tolerance or tolerance > 0.01  # it learned something
    assert module.model.dtype == base
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {adapters}
    state = module.trainer.optimizers[0].state.values()
    assert {s["exp_avg"].dtype for s in state} == {adapters}
    if stage is DPOModule:
        assert actual[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("stage", [SFTModule, DPOModule])
def test_bf16_true_is_a_base_loaded_in_bf16(
    wide_dir: Callable[[str], Path], family: str, tmp_path: Path, stage: type[AlignmentModule]
) -> None:
    """To the bit: rotary frequencies, too, stay fp32 where transformers keeps them so."""
    loaded = losses(wide_dir(family), stage, tmp_path, {"dtype": "bfloat16"}, precision="32-true")
    cast = losses(wide_dir(family), stage, tmp_path, {}, precision="bf16-true")
    assert cast[1] == loaded[1]
    for a, b in zip(cast[0].model.parameters(), loaded[0].model.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_loss_scaling_changes_nothing(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """16-mixed: a fused optimizer's gradients are unscaled before they are logged and clipped."""

    base = str(model_dir("gpt2"))

    def norms(**options: Any) -> list[float]:
        torch.manual_seed(1)
        module = SFTModule(base, optimizer=adamw, schedule="constant_with_warmup")
        seen: list[float] = []
        run = trainer(tmp_path, max_steps=2, gradient_clip_val=0.01, **options)
        original = module._log

        def keep(name: str, value: Any, **kwargs: Any) -> None:
            seen.extend([float(value)] if name == "train/grad_norm" else [])
            original(name, value, **kwargs)

        module._log = keep  # type: ignore[method-assign]
        run.fit(module, loader(answers(4), 2))
        clipped = [p.grad for p in module.parameters() if p.requires_grad]
        return [*seen, torch.nn.utils.get_total_norm(clipped).item()]

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    expected = norms(precision="32-true")
    assert expected[0] > 0.011
    assert norms(plugins=[plugin]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_rounding_away_what_is_trained_is_refused(
    model_dir: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    module = SFTModule(str(model_dir("gpt2")), lora=None)
    mixed = precision.replace("true", "mixed")
    with pytest.raises(AlignkitError, match=rf"precision={precision}: .*; use {mixed}$"):
        trainer(tmp_path, max_steps=1, precision=precision).fit(module, loader(answers(2), 2))


def test_full_fine_tuning_in_float64(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    expected = losses(model_dir("gpt2"), SFTModule, tmp_path, {"lora": None}, precision="32-true")
    actual = losses(model_dir("gpt2"), SFTModule, tmp_path, {"lora": None}, precision="64-true")
    assert actual[1] == pytest.approx(expected[1], abs=1e-3)
    assert {p.dtype for p in actual[0].parameters()} == {torch.float64}


class Quantized(Precision):
    """A plugin nobody has tried."""


def test_an_unknown_precision_is_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, plugins=[Quantized()])
    with pytest.raises(AlignkitError, match=r"Quantized is not supported; use bf16-mixed"):
        run.fit(SFTModule(str(model_dir("gpt2"))), loader(answers(2), 2))


def test_nothing_in_a_batch_is_cast(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Nor are a cached reference's log-probs, though their floats could be."""
    module = SFTModule(str(model_dir("gpt2")))
    run = trainer(tmp_path, max_steps=1, precision="bf16-true")
    run.fit(module, loader(answers(2), 2))
    batch = ReferenceCache(tmp_path, "reference").look_up(collate(pairs(2)))
    assert run.precision_plugin.convert_input(batch) is batch
    converted = run.precision_plugin.convert_input({"x": torch.zeros(1)})
    assert converted["x"].dtype == torch.bfloat16
    plugin = HalfPrecision("bf16-true")
    assert plugin.convert_input(torch.zeros(1)).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_resumes_to_the_bit(
    model_dir: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    """Weights saved in float64 are not rounded to fp32 on their way back."""
    examples, base = pairs(16), str(model_dir("llama"))

    def fit(steps: int, batches: list[Example], ckpt: Path | None = None) -> DPOModule:
        torch.manual_seed(1)
        module = DPOModule(base, lora=ADAPTED, optimizer=adamw, schedule="constant_with_warmup")
        run = trainer(tmp_path, max_steps=steps, precision=precision)
        run.fit(module, loader(batches, 2), ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = fit(4, examples)
    fit(2, examples)
    resumed = fit(4, examples[4:], tmp_path / "2.ckpt")
    for (name, a), b in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_reference_shares_what_is_frozen_when_it_is_cast(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    module = DPOModule(str(model_dir("gpt_neox")), lora=ADAPTED)
    trainer(tmp_path, max_steps=1, precision="bf16-true").fit(module, loader(pairs(2), 2))
    reference = dict(module.reference.model.named_parameters())
    for name, parameter in module.model.named_parameters():
        shared = parameter.data_ptr() == reference[name].data_ptr()
        assert shared is not parameter.requires_grad


def test_cached_log_probs_of_another_precision_are_not_used(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    homes = set()
    for precision in ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"):
        module = DPOModule(str(model_dir("gpt2")), reference_cache=str(tmp_path / "cache"))
        for _ in range(2):  # a new cache, and one that knows every row
            run = trainer(tmp_path, max_epochs=1, precision=precision)
            run.fit(module, loader(pairs(4), 2))
            assert run.callback_metrics["train/loss"].isfinite()
        assert module.reference.cache is not None
        assert list(module.reference.cache.home.glob("*.safetensors"))
        homes.add(module.reference.cache.home.name)
    assert len(homes) == 5


def test_sums_stay_float64_when_a_module_that_has_validated_is_cast(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    module = SFTModule(str(model_dir("gpt2")))
    run = trainer(tmp_path, precision="32-true")
    run.validate(module, loader(answers(4), 2), verbose=False)
    module.to(torch.bfloat16)
    for metric in module.val_metrics.means.values():
        assert metric.total.dtype == torch.float64


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16"])
def test_fp8_is_refused_whether_or_not_its_package_is_there(
    alignkit: Callable, hh: Path, model_dir: Callable[[str], Path], precision: str
) -> None:
    status, _, err = alignkit(
        "fit", "--model", "alignkit.SFTModule", "--model.base", model_dir("gpt2"),
        "--data", "alignkit.HHSFTDataModule", "--data.path", hh,
        "--trainer.precision", precision, "--trainer.max_steps", 1,
    )  # fmt: skip
    assert status == 2
    assert err.splitlines()[-1] == (
        f"alignkit: error: trainer.precision={precision}: fp8 layers are not supported; use "
        "bf16-mixed, bf16-true or 32-true"
    )
