"""Two gloo ranks that shard their blocks against one process: losses, norms and weights."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.models import shards
from alignkit.models.archive import read_archive
from alignkit.models.checkpoint import load_policy
from alignkit.models.find import load_checkpoint
from alignkit.modules import SFTModule
from alignkit.tools.export import export
from alignkit.utils.finite import nested_tensors
from tests.distributed.sharded import CASES

pytestmark = pytest.mark.slow
MODULE = [sys.executable, "-W", "ignore", "-m", "tests.distributed.sharded"]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    mine = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {k: str(v) for k, v in mine.items()} | {"MASTER_ADDR": "127.0.0.1"}


def launch(ranks: int, *arguments: object) -> None:
    """Run the cases on one process or on several, which must all end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [*MODULE, *map(str, arguments)],
            env=os.environ | (rank_environment(rank, ranks, port) if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(errors)


TIED = ("lora", "full", "dpo")


@pytest.fixture(scope="module")
def home(
    model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Every case trained by one process and by two."""
    return train(tmp_path_factory.mktemp("sharded"), str(model_dir("llama")), CASES)


@pytest.fixture(scope="module")
def tied(
    model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Three cases with a model whose head is its embedding."""
    return train(tmp_path_factory.mktemp("tied"), str(model_dir("gpt2")), TIED)


def train(place: Path, base: str, cases: Iterable[str]) -> tuple[Path, str]:
    (place / "data").mkdir()
    draw = random.Random(0)

    def words() -> str:
        return " ".join(draw.choices(["bread", "tea", "salt", "rain"], k=draw.randint(1, 12)))

    for split, count in (("train", 32), ("test", 7)):
        prompts = [f"\n\nHuman: {i} {words()}?\n\nAssistant:" for i in range(count)]
        rows = [{"chosen": f"{p} {words()}!", "rejected": f"{p} {words()}."} for p in prompts]
        (place / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for ranks in (1, 2):
        launch(ranks, ",".join(cases), place, base)
    return place, base


def results(place: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = place / name
    return json.loads((folder / "found.json").read_text()), torch.load(
        folder / "end.pt", weights_only=True
    )


@pytest.mark.parametrize(
    ("base", "case"), [("home", case) for case in CASES] + [("tied", case) for case in TIED]
)
def test_two_ranks_that_shard_train_as_one_process_does(
    base: str, case: str, request: pytest.FixtureRequest
) -> None:
    place, _ = request.getfixturevalue(base)
    (one, whole), (two, gathered) = results(place, f"{case}-1"), results(place, f"{case}-2")
    tolerance = {"rtol": 1e-6, "atol": 2e-6} if case != "mixed" else {"rtol": 2e-2, "atol": 1e-3}
    assert len(two["steps"]) == 8
    torch.testing.assert_close(
        torch.tensor(two["steps"]), torch.tensor(one["steps"]), **{**tolerance, "rtol": 1e-5}
    )
    torch.testing.assert_close(two["val"], one["val"], **tolerance)
    assert gathered.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(gathered[name], value, **tolerance)
    # Embedding, norms and head are divided too, and no block stays whole between the two passes.
    assert two["undivided"] == []
    assert two["whole"] == [0]


def test_the_reference_shares_the_policy_s_frozen_shards(home: tuple[Path, str]) -> None:
    """All but the two factors of each of the seven linear layers in two blocks."""
    found, _ = results(home[0], "dpo-2")
    one, _ = results(home[0], "dpo-1")
    assert found["shared"] == one["shared"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_process_never_holds_more_than_one_block_whole(case: str, home: tuple[Path, str]) -> None:
    """Two blocks of the policy, and of the reference where there is one."""
    found, _ = results(home[0], f"{case}-2")
    assert found["held"] == [1.0] * (4 if "dpo" in case or case == "mixed" else 2)


@pytest.mark.parametrize(("case", "divided"), [("lora", 0), ("full", 1), ("full_dpo", 0)])
def test_checkpoints_of_whole_models_have_shards_unless_one_file_is_asked_for(
    case: str, divided: int, home: tuple[Path, str]
) -> None:
    """Every file its own, those of the last one overwritten at each validation."""
    files = list((home[0] / f"{case}-2").glob("*.ckpt"))
    assert len(files) > 2
    for file in files:
        assert len(list(shards.home(file).glob("*"))) == divided
        content = read_archive(file)
        assert any(t.is_meta for t in content["state_dict"].values()) == bool(divided)
    assert not list((home[0] / f"{case}-1").glob("*.shards"))


def test_a_checkpoint_with_shards_is_written_into_one_file(
    home: tuple[Path, str], tmp_path: Path
) -> None:
    source = home[0] / "full-2" / "last.ckpt"
    export(str(source), str(tmp_path / "one"), to="checkpoint")
    content, theirs = read_archive(tmp_path / "one" / "last.ckpt"), load_checkpoint(source)
    assert content.keys() == theirs.keys()
    tensors, others = (dict(nested_tensors(each)) for each in (content, theirs))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name])
    moments = [name for name in tensors if name.endswith("exp_avg")]
    assert len(moments) == len(content["state_dict"])
    module = SFTModule.load_from_checkpoint(source)
    for name, value in module.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])


@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_checkpoint_is_read_by_every_command_and_by_any_number_of_ranks(
    case: str, home: tuple[Path, str]
) -> None:
    place, base = home
    file = place / f"{case}-2" / "last.ckpt"
    model, _ = load_policy(str(file))
    state = results(place, f"{case}-2")[1]
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name.removeprefix("model.")], v) for name, v in state.items())
    # Four of the eight steps were two ranks' and the others are one process's, or the reverse.
    for ranks, other in ((1, 2), (2, 1)):
        (middle,) = (place / f"{case}-{other}").glob("*step=4.ckpt")
        launch(ranks, case, place, base, middle)
        resumed = results(place, f"{case}-{ranks}-resumed")[1]
        for name, value in state.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-6, atol=2e-6)
