"""On a GPU: the paths that only exist there, against the CPU in fp32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.engine import PackedBatch, collate, score
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models.lean import lean_modules
from alignkit.modules import DPOModule, SFTModule
from alignkit.modules.base import AlignmentModule
from tests.modules.helpers import answers, loader, logged_steps, pairs, trainer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """The model with lighter modules and an adapter whose B is not zero."""
    lean_modules(model)
    inject_lora(model, LoRAConfig(targets="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return model


def scores_and_gradients(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Every log-prob, and the gradients of their sum in one vector; both on the CPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    logps_N = score(model, batch)
    gradients = torch.autograd.grad(logps_N.sum(), trained)
    return logps_N.detach().cpu(), torch.cat([g.float().cpu().flatten() for g in gradients])


def test_fp32_agrees_with_the_cpu(tiny_model: Callable[..., PreTrainedModel], family: str) -> None:
    model, batch = adapted(tiny_model(family)), collate(pairs(6))
    expected = scores_and_gradients(model, batch)
    actual = scores_and_gradients(copy.deepcopy(model).to(CUDA), batch.to(CUDA))
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_autocast_stays_near_the_cpu_in_fp32(
    tiny_model: Callable[..., PreTrainedModel], family: str, base: torch.dtype
) -> None:
    """Over a bf16 base and over an fp32 one, whose rotary embeddings autocast leaves in fp32."""
    model, batch = adapted(tiny_model(family)), collate(pairs(6))
    expected = scores_and_gradients(model, batch)
    on_gpu = copy.deepcopy(model).to(CUDA)
    for parameter in on_gpu.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(base)
    with torch.autocast("cuda", torch.bfloat16):
        actual = scores_and_gradients(on_gpu, batch.to(CUDA))
    assert (actual[0] - expected[0]).abs().mean() < 0.1
    assert torch.cosine_similarity(actual[1], expected[1], dim=0) > 0.98


def test_dpo_trains(model_dir: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    """From ln 2 with rewards of exactly 0, in a reference that is on the GPU too."""
    module = DPOModule(
        str(model_dir(family)), lora=LoRAConfig(targets="all-linear"), dtype="bfloat16"
    )
    batches = loader(pairs(8), 4)
    run = trainer(tmp_path, accelerator="gpu", precision="bf16-mixed", max_steps=1)
    run.fit(module, batches)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert run.callback_metrics["train/rewards/margins"].item() == 0.0
    (held_out,) = run.validate(module, batches, verbose=False)
    assert math.isfinite(held_out["val/loss"])


@pytest.fixture
def waiting_fails() -> Iterator[Callable[[], None]]:
    """A function after which CUDA refuses whatever makes the host wait."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", [SFTModule, DPOModule])
def test_a_step_never_waits_for_the_device(
    model_dir: Callable[[str], Path],
    family: str,
    stage: Callable[..., AlignmentModule],
    waiting_fails: Callable[[], None],
) -> None:
    """Once a row is laid out, which copies its offsets."""
    module = stage(str(model_dir(family)), lora=LoRAConfig(targets="all-linear"), dtype="bfloat16")
    module = module.to(CUDA).train()
    batch = collate(pairs(4) if stage is DPOModule else answers(4)).to(CUDA)
    for number in range(2):
        if number:
            waiting_fails()
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.training_step(batch, number)
        loss.backward()
    module.window.close(lambda totals: totals)


def test_a_whole_step_over_new_rows_never_waits(
    model_dir: Callable[[str], Path], family: str, waiting_fails: Callable[[], None]
) -> None:
    """Laying out a row, forward, backward, clipping and AdamW; the guard of the step waits once."""
    module = DPOModule(
        str(model_dir(family)), lora=LoRAConfig(targets="all-linear"), dtype="bfloat16"
    )
    module = module.to(CUDA).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = module.optimizer(trained)
    rows = [collate(pairs(4, seed)).to(CUDA) for seed in range(3)]
    for number, batch in enumerate(rows):
        if number == 2:
            waiting_fails()
        with torch.autocast("cuda", torch.bfloat16):
            output = module.compute_loss(batch)
        (output.loss_sum / output.weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_a_batch_arrives_without_waiting(waiting_fails: Callable[[], None]) -> None:
    batch = collate(pairs(4)).pin_memory()
    waiting_fails()
    arrived = batch.to(CUDA)
    torch.cuda.set_sync_debug_mode("default")
    assert arrived.input_ids.equal(batch.input_ids.to(CUDA))


def test_step_0_is_ln_2_over_hundreds_of_pairs(
    model_dir: Callable[[str], Path], family: str
) -> None:
    """Policy and reference score alike in bf16 autocast: every pair's margin is 0."""
    module = DPOModule(
        str(model_dir(family)), lora=LoRAConfig(targets="all-linear"), dtype="bfloat16"
    )
    module = module.to(CUDA).train()
    batch = collate(pairs(256)).to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        output = module.compute_loss(batch)
    assert (output.loss_sum / output.weight).item() == pytest.approx(math.log(2), abs=1e-6)
    assert output.metrics["rewards/margins"].item() == 0.0


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_losses_fall_as_on_the_cpu(
    model_dir: Callable[[str], Path], tmp_path: Path, compiled: bool
) -> None:
    """The same ten steps on both devices, bf16-mixed: losses stay together and fall."""
    found = {}
    for accelerator in ("cpu", "gpu"):
        module = DPOModule(
            str(model_dir("gpt2")),
            lora=LoRAConfig(targets="all-linear"),
            dtype="bfloat16",
            compile=compiled and accelerator == "gpu",
            schedule="constant_with_warmup",
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
        )
        losses = logged_steps(module)
        run = trainer(tmp_path, accelerator=accelerator, precision="bf16-mixed", max_epochs=10)
        run.fit(module, loader(pairs(8), 8))
        found[accelerator] = losses["train/loss"]
    assert found["gpu"][-1] < found["gpu"][0] - 0.05
    assert found["gpu"] == pytest.approx(found["cpu"], abs=0.05)
