"""The reference cache: right values, used when it may be, and caught when it is wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule
from alignkit.modules.reference import Reference
from alignkit.modules.reference_cache import ReferenceCache, example_keys
from alignkit.objectives.preference import DPO
from tests.modules.helpers import loader, pairs, trainer


def test_take_equals_collating_the_examples() -> None:
    examples = pairs(6)
    taken = collate(examples).take([4, 0, 5])
    expected = collate([examples[i] for i in (4, 0, 5)])
    for name in ("input_ids", "position_ids", "score_from", "target_ids", "response_index"):
        assert torch.equal(getattr(taken, name), getattr(expected, name)), name
    assert taken.spans == expected.spans


def test_keys_do_not_depend_on_the_batch() -> None:
    examples = pairs(5)
    together = example_keys(collate(examples))
    assert together == [example_keys(collate([e]))[0] for e in examples]
    assert len(set(together)) == 5


@pytest.fixture
def run(model_dir: Callable, tmp_path: Path) -> Callable[..., tuple[DPOModule, dict]]:
    """Train two epochs with the cache and return the module and what was logged."""

    def fit(every: int = 1, **options: object) -> tuple[DPOModule, dict]:
        torch.manual_seed(0)
        module = DPOModule(
            str(model_dir("gpt2")), reference_cache=str(tmp_path / "cache"), **options
        )
        forwards: list[int] = []
        module.reference.model.base_model.register_forward_hook(
            lambda _, args, kwargs, out: forwards.append(out.last_hidden_state.shape[1]),
            with_kwargs=True,
        )
        logged = {"forwards": forwards}
        runner = trainer(tmp_path, max_epochs=1, log_every_n_steps=every)
        runner.fit(module, loader(pairs(8), 4))
        return module, {**runner.callback_metrics, **logged}

    return fit


def test_a_second_run_reuses_the_first(run: Callable, tmp_path: Path) -> None:
    """Another β: of each batch one probe row is scored, not all.

    The first step scores its whole batch once more, to prove that policy and reference agree.
    """
    first, last = collate(pairs(8)[:4]).num_tokens, collate(pairs(8)[4:]).num_tokens
    _, logged = run(loss=DPO(beta=0.1))
    assert logged["forwards"] == [first, first, last]
    second, logged = run(loss=DPO(beta=0.5))
    probes = [logged["forwards"][0], logged["forwards"][2]]
    assert 0 < probes[0] < first and 0 < probes[1] < last
    assert logged["ref/cache_abs_err"] < 1e-4
    batch = collate(pairs(8)[:4])
    referenced = second.on_before_batch_transfer(batch, 0)
    live = response_sums(score(second.reference.model, batch), batch)
    torch.testing.assert_close(referenced.known_R, live, atol=1e-4, rtol=1e-5)
    scores = second.reference_scores(referenced)
    torch.testing.assert_close(scores.chosen, live[0::2], atol=1e-4, rtol=1e-5)


def test_as_many_cached_rows_are_checked_as_asked_for(run: Callable) -> None:
    run()
    module, _ = run(reference_checks=3)
    assert module.on_before_batch_transfer(collate(pairs(8)[:4]), 0).probe.num_examples == 3
    with pytest.raises(AlignkitError, match="reference_checks=0: give at least 1"):
        run(reference_checks=0)


def test_another_reference_has_another_cache(run: Callable, model_dir: Callable) -> None:
    _, _ = run()
    _, logged = run(dtype="bfloat16")
    assert logged["forwards"][0] == collate(pairs(8)[:4]).num_tokens


def test_a_corrupted_row_is_named_and_scored_again(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, _ = run()
    (shard,) = module.reference.cache.home.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["sums"][5] += 1.0  # example 2's second response
    save_file(tensors, shard)
    with caplog.at_level(logging.WARNING):
        cache = ReferenceCache(tmp_path / "cache", module.reference.cache.home.name)
    assert f"{shard}: row 2 is corrupted" in caplog.text
    referenced = cache.look_up(collate(pairs(8)[:4]))
    assert referenced.known_R.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert 4 in referenced.probe_R.tolist()


def test_a_truncated_shard_is_skipped(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, _ = run()
    (shard,) = module.reference.cache.home.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    _, logged = run()
    assert "unreadable" in caplog.text
    assert logged["forwards"][0] == collate(pairs(8)[:4]).num_tokens


def test_training_goes_on_where_the_cache_cannot_be_written(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file lies in its folder's place: said once, and everything is scored live."""
    (tmp_path / "cache").write_text("")
    _, logged = run()
    assert caplog.text.count("model.reference_cache: ") == 1
    assert logged["forwards"][0] == collate(pairs(8)[:4]).num_tokens


def test_a_disk_that_fills_up_costs_the_cache_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows read before stay in use, new ones live on in memory, and no write is tried again."""
    batch = collate(pairs(4))
    cache = ReferenceCache(tmp_path, "name")
    shutil.rmtree(tmp_path / "name")
    (tmp_path / "name").write_text("")  # nothing can be written below a file
    for seed in (0, 1):
        found = cache.look_up(collate(pairs(4, seed)))
        cache.add(found, torch.arange(8.0))
        cache.write()
    assert caplog.text.count("model.reference_cache: ") == 1
    assert cache.look_up(batch).known_R.tolist() == list(range(8))


def test_wrong_values_stop_the_run(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows whose checksum is right but whose values are another model's, logged or not."""
    module, _ = run()
    original = ReferenceCache._read

    def shifted(self: ReferenceCache, shard: Path) -> None:
        original(self, shard)
        for key in self._rows:
            self._rows[key] = self._rows[key] + 5.0

    monkeypatch.setattr(ReferenceCache, "_read", shifted)
    for every in (1, 50):
        with pytest.raises(AlignkitError, match=r"off by 5.* delete "):
            run(every=every)
    module = DPOModule(module.base, reference_cache=str(tmp_path / "cache"))
    for measure in (trainer(tmp_path).validate, trainer(tmp_path).test):
        with pytest.raises(AlignkitError, match=r"off by 5.* delete "):
            measure(module, loader(pairs(8), 4), verbose=False)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_reference_alone_scores_what_score_does(model_dir: Callable, k: int) -> None:
    """Rows of any number of responses, without Lightning, before and after the policy moves."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir("gpt2")).eval()
    batch = collate([Example((1, 2, 3), ((4, 5), (6,), (7, 8, 9))[:k]), Example((2,), ((3,),) * k)])
    with torch.no_grad():
        before = response_sums(score(model, batch), batch)
    reference = Reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.equal(response_sums(score(model, batch), batch), before)
    sums = reference.train().sums(batch)
    assert torch.equal(sums, before)
    assert not sums.requires_grad
    assert not sums.is_inference()
    assert not any(m.training for m in reference.modules())


def test_ddp_ignores_exactly_the_tensors_of_the_reference(model_dir: Callable, family: str) -> None:
    """Under every name: tied weights have two, and buffers need not be in a state dict."""
    module = DPOModule(str(model_dir(family)), lora=LoRAConfig(targets="all-linear"))
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    expected = {name for name, _ in named if name.startswith("reference.")}
    ignored = module._ddp_params_and_buffers_to_ignore
    assert set(ignored) == expected
    assert len(ignored) == len(expected)
    assert {name.removeprefix("reference.") for name in expected} == {
        name for name, _ in named if name.startswith("model.")
    }
