"""Two gloo ranks without a common seed start from the weights of the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from alignkit.modules import DPOModule
from tests.modules.helpers import trainer


def draw(rank: int, base: str, home: str) -> None:
    torch.manual_seed(rank)
    module = DPOModule(base, lora=None, random_init=True, reference_cache=f"{home}/cache")
    dist.init_process_group("gloo", f"file://{home}/met", rank=rank, world_size=2)
    module.trainer = trainer(home)
    module.setup("fit")
    state = {**dict(module.model.named_parameters()), **dict(module.reference.named_parameters())}
    torch.save(state | {"home": module.reference.cache.home.name}, f"{home}/rank{rank}.pt")
    dist.destroy_process_group()


def test_policy_and_reference_are_those_of_rank_0(model_dir: Callable, tmp_path: Path) -> None:
    """What no DDP synchronises too: the copies, sharded runs' whole parameters, and their cache."""
    spawn(draw, (str(model_dir("llama")), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(first) > 20
    assert first.pop("home") == second.pop("home")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(first["lm_head.weight"], first["model.lm_head.weight"])
