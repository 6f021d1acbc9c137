"""What a checkpoint holds, whom it lets in, and that resuming is bit-exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from alignkit.engine import collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, save_adapter
from alignkit.models.checkpoint import load_policy, read_checkpoint
from alignkit.modules import DPOModule, LoRAModule, SFTModule
from alignkit.utils.random_state import restore_random_state
from tests.modules.helpers import answers, loader, pairs, trainer

FAST = {"lora": LoRAConfig(dropout=0.1)}


def fit(module: object, directory: Path, steps: int, examples: list, **options: object) -> Path:
    """Train, checkpoint after every step, and return the last checkpoint."""
    saver = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        directory, max_steps=steps, callbacks=[saver], enable_checkpointing=True, **options
    )
    run.fit(module, loader(examples, 2), ckpt_path=options.get("ckpt_path"))
    return directory / "last.ckpt"


@pytest.fixture
def sft_ckpt(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return fit(SFTModule(str(model_dir("gpt2"))), tmp_path / "sft", 3, answers(8))


def test_holds_adapters_and_state_but_no_base(sft_ckpt: Path, model_dir: Callable) -> None:
    checkpoint = torch.load(sft_ckpt, weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    # layers x (c_attn, c_proj, c_fc, c_proj) x (A, B)
    assert len(checkpoint["state_dict"]) == 2 * 4 * 2
    assert checkpoint["optimizer_states"] and checkpoint["lr_schedulers"]
    base = sum(f.stat().st_size for f in model_dir("gpt2").glob("*.safetensors"))
    assert sft_ckpt.stat().st_size < base


def test_resume_is_bit_exact(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Four steps, or two, a new process' worth of objects, and two more: the same adapters.

    Adapter dropout is on, so the random stream must continue too.
    """
    base = str(model_dir("gpt2"))
    examples = pairs(8)

    def make() -> DPOModule:
        torch.manual_seed(7)
        return DPOModule(base, **FAST)

    whole = fit(make(), tmp_path / "whole", 4, examples)
    module, saver = (
        make(),
        ModelCheckpoint(tmp_path / "half", every_n_train_steps=2, save_last=True),
    )
    run = trainer(tmp_path, max_steps=4, callbacks=[saver], enable_checkpointing=True)

    class Stop(Exception):
        pass

    # Interrupted after step 2 of a run that means to take 4: the schedule is the whole run's.
    original = module.training_step

    def training_step(batch: object, batch_idx: int) -> torch.Tensor:
        if module.global_step == 2:
            raise Stop
        return original(batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run.fit(module, loader(examples, 2))
    resumed = make()
    torch.manual_seed(99)
    run = trainer(tmp_path, max_steps=4)
    # The plain loader here starts over; skip what the first two steps consumed.
    run.fit(resumed, loader(examples[4:], 2), ckpt_path=str(tmp_path / "half" / "last.ckpt"))
    expected = torch.load(whole, weights_only=True)["state_dict"]
    actual = resumed.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_stage_chaining_starts_from_the_weights(sft_ckpt: Path, model_dir: Callable) -> None:
    """DPO from an SFT checkpoint: policy and reference both score as the SFT policy does."""
    base = str(model_dir("gpt2"))
    batch = collate(pairs(3))
    sft, _ = load_policy(str(sft_ckpt))
    dpo = DPOModule(base, init_from=str(sft_ckpt))
    plain = DPOModule(base)
    assert torch.equal(score(dpo.model, batch), score(sft, batch))
    assert torch.equal(score(dpo.reference.model, batch), score(sft, batch))
    assert not torch.equal(score(plain.model, batch), score(sft, batch))


def test_init_from_a_peft_directory(sft_ckpt: Path, model_dir: Callable, tmp_path: Path) -> None:
    base = str(model_dir("gpt2"))
    sft, _ = load_policy(str(sft_ckpt))
    save_adapter(sft, tmp_path / "adapter", base=base)
    batch = collate(pairs(3))
    module = DPOModule(base, init_from=str(tmp_path / "adapter"))
    torch.testing.assert_close(score(module.model, batch), score(sft, batch))
    policy, _ = load_policy(str(tmp_path / "adapter"))
    torch.testing.assert_close(score(policy, batch), score(sft, batch))


def test_load_from_checkpoint_rebuilds_the_module(sft_ckpt: Path) -> None:
    module = SFTModule.load_from_checkpoint(sft_ckpt)
    sft, _ = load_policy(str(sft_ckpt))
    batch = collate(answers(3))
    assert torch.equal(score(module.model, batch), score(sft, batch))


def test_another_class_is_refused(sft_ckpt: Path, model_dir: Callable, tmp_path: Path) -> None:
    module = DPOModule(str(model_dir("gpt2")))
    with pytest.raises(AlignkitError, match=r"SFTModule cannot resume DPOModule.*init_from"):
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 2), ckpt_path=str(sft_ckpt))


@pytest.mark.parametrize("by", ["init_from", "ckpt_path", "load_policy"])
def test_another_base_is_refused(
    sft_ckpt: Path, model_dir: Callable, tmp_path: Path, by: str
) -> None:
    """A base of the same shape with one weight matrix changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(model_dir("gpt2"), dtype=torch.float32)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_dir("gpt2")).save_pretrained(tmp_path / "other")
    base = str(tmp_path / "other")
    use = {
        "init_from": lambda: SFTModule(base, init_from=str(sft_ckpt)),
        "load_policy": lambda: load_policy(str(sft_ckpt), base=base),
        "ckpt_path": lambda: trainer(tmp_path, max_steps=1).fit(
            SFTModule(base), loader(answers(2), 2), ckpt_path=str(sft_ckpt)
        ),
    }
    with pytest.raises(AlignkitError, match="another base model"):
        use[by]()


def test_other_lora_settings_are_refused(sft_ckpt: Path, model_dir: Callable) -> None:
    with pytest.raises(AlignkitError, match="wrong shape"):
        DPOModule(str(model_dir("gpt2")), lora=LoRAConfig(r=4), init_from=str(sft_ckpt))


def test_another_reference_is_refused(sft_ckpt: Path, model_dir: Callable, tmp_path: Path) -> None:
    """Resuming DPO without the SFT weights it started from would change the reference."""
    base = str(model_dir("gpt2"))
    dpo = fit(DPOModule(base, init_from=str(sft_ckpt)), tmp_path / "dpo", 1, pairs(2))
    with pytest.raises(AlignkitError, match="another reference"):
        DPOModule(base).on_load_checkpoint(read_checkpoint(dpo))
    DPOModule(base, init_from=str(sft_ckpt)).on_load_checkpoint(read_checkpoint(dpo))


def test_full_fine_tuning_round_trip(model_dir: Callable, tmp_path: Path) -> None:
    base = str(model_dir("llama"))
    module = LoRAModule(base, lora=None)
    path = fit(module, tmp_path / "full", 2, answers(4))
    policy, _ = load_policy(str(path))
    batch = collate(answers(3))
    module.model.eval()
    # Frozen and trained heads take different paths to the same number.
    torch.testing.assert_close(score(policy, batch), score(module.model, batch))
    saved = dict(module.model.named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in policy.named_parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "not a readable checkpoint"),
        (b"garbage that is no archive", "checkpoint"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AlignkitError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"x": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(AlignkitError):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_ranks_beyond_the_saved_random_states_draw_streams_of_their_own() -> None:
    """Two states for four ranks: two go on exactly, the others begin anew, the same each time."""
    saved = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        saved.append({"cpu": torch.get_rng_state()})

    def draw(rank: int) -> float:
        restore_random_state(saved, torch.device("cpu"), rank)
        return torch.rand(()).item()

    drawn = [draw(rank) for rank in range(4)]
    assert drawn[:2] == [torch.manual_seed(s) and torch.rand(()).item() for s in (3, 4)]
    assert len(set(drawn)) == 4
    assert drawn == [draw(rank) for rank in range(4)]


def test_the_random_state_of_an_earlier_checkpoint_is_restored() -> None:
    """It held one state rather than a list."""
    state = {"cpu": torch.get_rng_state()}
    expected = torch.rand(3)
    restore_random_state(state, torch.device("cpu"), rank=0)
    assert torch.equal(torch.rand(3), expected)
