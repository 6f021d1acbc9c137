"""Every page of docs/extend.md does what it says."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import tensor

from alignkit.cli import main
from alignkit.engine import Example, collate, score
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models import load_model
from alignkit.objectives.preference import PairScores
from tests.data.conftest import write_jsonl

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
POLICY = PairScores(tensor([-4.0]), tensor([-9.0]), tensor([4]), tensor([3]))
REFERENCE = PairScores(tensor([-5.0]), tensor([-8.0]), tensor([4]), tensor([3]))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Save a page's ``mine.py`` in an empty working folder and import it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))

    def save(title: str) -> ModuleType:
        section = PAGE.read_text(encoding="utf-8").partition(f"## {title}")[2]
        code = re.search(r"```python\n(# mine.py\n.*?)```", section, re.DOTALL)
        assert code is not None
        (tmp_path / "mine.py").write_text(code[1])
        sys.modules.pop("mine", None)  # another test's
        importlib.invalidate_caches()
        import mine  # type: ignore[import-not-found]

        return mine

    yield save
    sys.modules.pop("mine", None)


def fit(model_dir: Path, *options: object) -> int:
    """Train two steps with a command."""
    fixed = ("--model.base", model_dir, "--model.lora.targets", "all-linear")
    trainer = (
        "--trainer.max_steps",
        2,
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
    )
    quiet = ("--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false")
    return main(["fit", *(str(o) for o in (*options, *fixed, *trainer, *quiet))])


def test_every_command_is_understood(
    page: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is printed, beside its section's ``mine.py``."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```sh\nalignkit ([^\n]+)", text, re.M | re.S)
    assert len(found) == 5
    for title, command in found:
        page(title)
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command), "--print_config"])
        assert ended.value.code in (0, None), capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A few pairs."""
    rows = [
        {"prompt": f"Why {n}?", "chosen": f"Because of {n}.", "rejected": "No."} for n in range(12)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def test_the_dpo_loss_is_changed_in_one_file(
    page: Callable, model_dir: Callable[[str], Path], pairs: Path
) -> None:
    loss = page("Change the DPO loss").HingeDPO(beta=0.2)
    assert loss(POLICY, REFERENCE).tolist() == pytest.approx([1 - 0.2 * (5 - 3)])
    arguments = ("--model", "DPOModule", "--model.loss", "mine.HingeDPO", "--model.loss.beta", 0.2)
    data = ("--data", "PreferenceDataModule", "--data.path", pairs)
    assert fit(model_dir("llama"), *arguments, *data) == 0


def test_a_loss_of_twelve_lines_has_its_parameter_on_the_command_line(
    page: Callable, model_dir: Callable[[str], Path], pairs: Path
) -> None:
    mine = page("Write a loss with a parameter")
    loss = mine.Margin(gamma=1.0)
    wanted = -torch.nn.functional.logsigmoid(tensor([-1.0 + 3.0 - 1.0]))
    torch.testing.assert_close(loss(POLICY, POLICY), wanted)
    body = Path(mine.__file__).read_text().partition("@dataclass")[2].strip().splitlines()
    assert len([line for line in body if line]) <= 12
    arguments = ("--model", "DPOModule", "--model.loss", "mine.Margin", "--model.loss.gamma", 1.0)
    data = ("--data", "PreferenceDataModule", "--data.path", pairs)
    assert fit(model_dir("llama"), *arguments, *data) == 0


def test_metrics_are_logged_beside_the_others(
    page: Callable, model_dir: Callable, pairs: Path
) -> None:
    mine = page("Log something more")
    module = mine.LengthsDPO(str(model_dir("llama")))
    logged = module.metrics(POLICY, REFERENCE)
    assert logged["tokens/longer"] == 1
    assert "rewards/margins" in logged
    data = ("--data", "PreferenceDataModule", "--data.path", pairs)
    assert fit(model_dir("llama"), "--model", "mine.LengthsDPO", *data) == 0


def test_an_objective_of_ones_own(
    page: Callable, model_dir: Callable[[str], Path], pairs: Path
) -> None:
    page("Train on something other than pairs")
    data = ("--data", "PreferenceDataModule", "--data.path", pairs)
    assert fit(model_dir("llama"), "--model", "mine.BestOfTwo", *data) == 0


def test_a_row_shape_is_one_function(
    page: Callable, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    mine = page("Read a new shape of row")
    row = {
        "title": "Why is bread chewy?",
        "answers": [{"text": "Magic.", "votes": 1}, {"text": "Gluten.", "votes": 7}],
    }
    best, worst = mine.forum_sides(row)
    assert best.answer.strip() == "Gluten."
    assert worst.answer.strip() == "Magic."
    (tmp_path / "forum.jsonl").write_text(
        "".join(json.dumps({**row, "title": f"Why {n}?"}) + "\n" for n in range(12))
    )
    data = ("--data", "mine.ForumDataModule", "--data.path", tmp_path / "forum.jsonl")
    assert fit(model_dir("llama"), "--model", "DPOModule", *data) == 0


def test_a_lora_variant_is_one_class(page: Callable, model_dir: Callable[[str], Path]) -> None:
    mine = page("Write a LoRA variant")
    config = LoRAConfig(targets=("query_key_value",))
    models = [load_model(str(model_dir("gpt_neox"))) for _ in range(2)]
    for model, kind in zip(models, ({"linear": mine.FrozenALinear}, {}), strict=True):
        torch.manual_seed(0)
        inject_lora(model, config, **kind)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        model.train(False)
    batch = collate([Example(prompt=[1, 2], responses=[[3, 4], [5]])])
    ours, plain = (score(model, batch) for model in models)
    torch.testing.assert_close(ours, plain)
    ours.sum().backward()
    trained = {n.rpartition(".")[2] for n, p in models[0].named_parameters() if p.grad is not None}
    assert trained == {"lora_B"}
