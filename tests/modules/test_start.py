"""What ``init_from`` may name, the Hub included, and the line for what it may not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit.engine import collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, save_adapter
from alignkit.lora.peft_files import CONFIG_FILE, WEIGHTS_FILE
from alignkit.models import hub as models_hub
from alignkit.models import load_model
from alignkit.models.checkpoint import load_policy
from alignkit.modules import SFTModule
from tests.modules.helpers import pairs

BATCH = collate(pairs(3))
OWN = LoRAConfig(r=2, alpha=6, targets="c_fc")


@pytest.fixture
def adapter(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = inject_lora(load_model(str(model_dir("gpt2"))), OWN)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return save_adapter(model, tmp_path / "adapter", base=str(model_dir("gpt2")))


@pytest.fixture
def on_hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The adapter under a Hub id, in the Hub's cache as a download leaves it."""
    repository = tmp_path / "hub" / "models--someone--an-adapter"
    snapshot = repository / "snapshots" / "0f3c"
    for directory in (snapshot, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0f3c")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(adapter / name, repository / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr(models_hub.hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(models_hub, "hub_reachable", lambda: False)
    return "someone/an-adapter"


def test_an_adapter_by_its_hub_id(
    on_hub: str, adapter: Path, model_dir: Callable[[str], Path]
) -> None:
    module = SFTModule(str(model_dir("gpt2")), init_from=on_hub)
    module.model.eval()
    assert module.lora is not None and (module.lora.r, module.lora.alpha) == (2, 6)
    assert torch.equal(score(module.model, BATCH), score(load_policy(str(adapter))[0], BATCH))


def test_only_the_adapters_files_are_asked_for(
    on_hub: str, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    download = models_hub.snapshot_download

    def record(name: str, **options: object) -> str:
        asked.update(options)
        return download(name, **{**options, "local_files_only": True})

    monkeypatch.setattr(models_hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(models_hub, "snapshot_download", record)
    SFTModule(str(model_dir("gpt2")), init_from=on_hub)
    assert asked["local_files_only"] is False
    assert all(name.endswith((".json", ".safetensors")) for name in asked["allow_patterns"])
    assert not any("*" in name for name in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("someone/nothing", "the Hugging Face Hub cannot be reached"),
        ("nothing.ckpt", "no such checkpoint"),
        ("some/nothing.ckpt", "no such checkpoint"),
        ("./nothing", "no such checkpoint"),
    ],
)
def test_what_is_not_there_is_one_line(
    on_hub: str, model_dir: Callable[[str], Path], place: str, said: str
) -> None:
    with pytest.raises(AlignkitError) as caught:
        SFTModule(str(model_dir("gpt2")), init_from=place)
    assert place in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_model_is_a_base_and_no_start(model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(AlignkitError, match=r"a whole model as model\.base"):
        SFTModule(str(model_dir("gpt2")), init_from=str(model_dir("gpt2")))


def test_the_one_file_of_an_export_is_a_start(
    adapter: Path, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from alignkit.tools.export import export

    export(str(adapter), str(tmp_path / "file"), to="safetensors")
    file = str(tmp_path / "file" / "adapter.safetensors")
    module = SFTModule(str(model_dir("gpt2")), init_from=file)
    assert module.lora is not None and module.lora.r == 2
    policy, _ = load_policy(file)
    module.model.eval()
    assert torch.equal(score(module.model, BATCH), score(policy, BATCH))
