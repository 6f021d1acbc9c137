"""TR-DPO: the reference follows the policy, in checkpoints too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.models.checkpoint import read_checkpoint
from alignkit.modules import DPOModule, KTOModule
from alignkit.modules.sharding import _refuse_with_sharding
from alignkit.objectives.preference import SimPO
from tests.modules.helpers import loader, pairs, trainer


def parameters(module: DPOModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What trains, of the policy and of the reference."""
    policy = {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}
    reference = dict(module.reference.model.named_parameters())
    return policy, {name: reference[name].clone() for name in policy}


class Record(Callback):
    """Keep the parameters after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_end(self, run: object, module: DPOModule, *_: object) -> None:
        if module.global_step > len(self.steps):
            self.steps.append(parameters(module))


def made(model_dir: Callable, **options: object) -> DPOModule:
    torch.manual_seed(7)
    return DPOModule(
        str(model_dir("gpt2")),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        schedule="constant_with_warmup",
        **{"lora": LoRAConfig(dropout=0.1), **options},
    )


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lora", [LoRAConfig(), None], ids=["lora", "full"])
def test_a_copy_every_second_step(model_dir: Callable, tmp_path: Path, lora: object) -> None:
    """Windows of two micro-batches: it is optimizer steps that count."""
    module, record = made(model_dir, lora=lora, reference_every=2), Record()
    _, start = parameters(module)
    run = trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[record])
    run.fit(module, loader(pairs(20), 2))
    expected = start
    assert len(record.steps) == 5
    for step, (policy, reference) in enumerate(record.steps, start=1):
        expected = policy if step % 2 == 0 else expected
        assert same(reference, expected), step
    assert not same(record.steps[1][0], record.steps[2][0])


def test_mixing_is_trls(model_dir: Callable, tmp_path: Path) -> None:
    """Bit for bit what trl's callback makes of the same parameters."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    module, record = made(model_dir, reference_every=1, reference_mix=0.3), Record()
    _, expected = parameters(module)
    trainer(tmp_path, max_steps=3, callbacks=[record]).fit(module, loader(pairs(6), 2))
    for policy, reference in record.steps:
        mixed, own = (
            torch.nn.ParameterList([torch.nn.Parameter(v.clone()) for v in each.values()])
            for each in (expected, policy)
        )
        callbacks.SyncRefModelCallback._sync_target_model(own, mixed, 0.3)
        expected = dict(zip(policy, (p.detach() for p in mixed), strict=True))
        assert same(reference, expected)


def test_a_run_resumes_with_the_refreshed_reference(model_dir: Callable, tmp_path: Path) -> None:
    """Six steps, or the last three from the third's checkpoint: the same bits on both sides."""
    options = {"reference_every": 2, "reference_mix": 0.5}
    whole = made(model_dir, **options)
    saver = ModelCheckpoint(tmp_path / "a", every_n_train_steps=3, save_top_k=-1, save_last=False)
    run = trainer(tmp_path, max_steps=6, callbacks=[saver], enable_checkpointing=True)
    run.fit(whole, loader(pairs(12), 2))
    path = next((tmp_path / "a").glob("*step=3.ckpt"))
    resumed = made(model_dir, **options)
    torch.manual_seed(99)
    trainer(tmp_path, max_steps=6).fit(resumed, loader(pairs(12)[6:], 2), ckpt_path=path)
    for ours, theirs in zip(parameters(resumed), parameters(whole), strict=True):
        assert same(ours, theirs)
    fixed = made(model_dir)
    stop = trainer(tmp_path, max_steps=3)
    stop.validate(fixed, loader(pairs(4), 2), ckpt_path=path, verbose=False)
    assert same(parameters(fixed)[1], read_checkpoint(path)["refreshed_reference"])
    assert not same(parameters(fixed)[1], parameters(made(model_dir))[1])


def test_a_refreshed_reference_is_kept_by_runs_that_refresh_it_no_more(
    model_dir: Callable, tmp_path: Path
) -> None:
    """It lies in their checkpoints too, and a cache of the policy's first weights is refused."""
    place, kept = None, []
    for number, every in enumerate((2, None, None)):
        module = made(model_dir, reference_every=every)
        run = trainer(tmp_path, max_steps=2 + number)
        run.fit(module, loader(pairs(4 + 2 * number), 2), ckpt_path=place)
        place = tmp_path / f"{number}.ckpt"
        run.save_checkpoint(place)
        kept.append(parameters(module)[1])
    assert same(kept[0], kept[2])
    assert not same(kept[0], parameters(made(model_dir))[1])
    cached = made(model_dir, reference_cache=str(tmp_path / "cache"))
    with pytest.raises(AlignkitError, match=r"model\.reference_cache: does not work with a refr"):
        trainer(tmp_path).validate(cached, loader(pairs(4), 2), ckpt_path=place, verbose=False)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    base = made(model_dir, reference="base")
    with pytest.raises(AlignkitError, match=r"holds a refreshed.*leave out model\.reference base"):
        trainer(tmp_path).validate(base, loader(pairs(4), 2), ckpt_path=place, verbose=False)


def test_sharded_blocks_are_refused_at_the_start(model_dir: Callable, tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match=r"fsdp2: does not work with model\.reference_every; "):
        _refuse_with_sharding(made(model_dir, reference_every=2), trainer(tmp_path))


def test_what_does_not_go_together_is_one_line(model_dir: Callable, tmp_path: Path) -> None:
    base = str(model_dir("gpt2"))
    wrong: list[tuple[dict, str]] = [
        ({"reference_every": 0}, "model.reference_every=0: give a whole number of steps, at"),
        ({"reference_every": 2.5}, "model.reference_every=2.5: give a whole number of steps, at"),
        ({"reference_every": 2, "reference_mix": 0.0}, "model.reference_mix=0.0: give a share"),
        ({"reference_checks": 3}, "model.reference_checks=3: checks cached rows; give"),
        ({"reference_mix": 0.5}, "give model.reference_every as well"),
        ({"reference_every": 2, "reference": "base"}, "and model.reference is base"),
        ({"reference_every": 2, "loss": SimPO()}, "and model.reference is none"),
        ({"reference_every": 2, "reference_cache": str(tmp_path)}, "model.reference_cache: keeps"),
    ]
    for options, said in wrong:
        with pytest.raises(AlignkitError) as error:
            DPOModule(base, **options)
        assert said in str(error.value)
    with pytest.raises(AlignkitError, match="reference_every=0"):
        KTOModule(base, reference_every=0)
