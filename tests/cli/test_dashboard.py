"""What TensorBoard shows of a run, and bases that lie elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from alignkit.models.checkpoint import load_policy
from tests.cli.test_fit import quick


def plugin(accumulator: EventAccumulator, tag: str, name: str) -> bytes:
    content: bytes = accumulator.SummaryMetadata(tag).plugin_data.content
    assert accumulator.SummaryMetadata(tag).plugin_data.plugin_name == name
    return content


@pytest.fixture
def dpo(alignkit: Callable, model_dir: Callable, hh: Path, text: Path) -> Path:
    """The folder of a DPO run of three steps."""
    status, _, err = alignkit(*quick("demo/dpo.yaml", model_dir, hh, text))
    assert status == 0, err
    return Path("runs/demo/dpo/version_0")


def test_tensorboard(dpo: Path) -> None:
    accumulator = EventAccumulator(str(dpo), size_guidance={"scalars": 0}).Reload()
    scalars = accumulator.Tags()["scalars"]
    assert {"train/loss", "val/loss"} <= set(scalars)
    assert sorted(scalars)[:2] == ["loss/DPO/train", "loss/DPO/val"], "what TensorBoard opens on"
    for split in ("train", "val"):
        copied, loss = (
            [(point.step, point.value) for point in accumulator.Scalars(tag)]
            for tag in (f"loss/DPO/{split}", f"{split}/loss")
        )
        assert copied == loss
    assert {tag.partition("/")[0] for tag in scalars} == {"loss", "train", "val"}
    assert not [tag for tag in scalars if tag.endswith("_epoch")], "one point is no curve"
    assert "train/peak_memory_gib" in scalars
    drawn = {tag: accumulator.Histograms(tag)[-1] for tag in accumulator.Tags()["histograms"]}
    assert drawn.keys() == {"val/margins", "val/answer_tokens"}
    held = {tag: event.histogram_value.num for tag, event in drawn.items()}
    assert held["val/answer_tokens"] == 2 * held["val/margins"] > 0
    assert drawn["val/answer_tokens"].histogram_value.min >= 1

    start = plugin_data_pb2.HParamsPluginData.FromString(
        plugin(accumulator, "_hparams_/session_start_info", "hparams")
    ).session_start_info.hparams
    held = {name: value.WhichOneof("kind") for name, value in start.items()}
    assert start["lr"].number_value == pytest.approx(1e-4)
    assert start["optimizer"].string_value == "AdamW"
    assert start["data/max_length"].number_value == 128
    assert start["data/tokens_per_batch"].number_value == 512
    assert start["data/truncated_frac"].number_value == 0
    assert start["lora/r"].number_value == 8
    assert {"data/path", "base", "trainer/precision"} <= held.keys()
    assert any(name.startswith("loss") and "beta" in name for name in held), held
    assert start["activation_checkpointing"].string_value == "False"
    assert "_hparams_/experiment" not in accumulator.Tags()["tensors"], (
        "TensorBoard would take this run's columns for those of every run"
    )

    layout = layout_pb2.Layout()
    (packed,) = accumulator.Tensors("custom_scalars__config__")
    layout.ParseFromString(packed.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert layout.category[0].title == "DPO: training and validation"
    assert charts["loss"] == ["^loss/DPO/train$", "^loss/DPO/val$"]
    assert charts["rewards/margins"] == ["^train/rewards/margins$", "^val/rewards/margins$"]
    assert [*charts][:2] == ["loss", "rewards/accuracies"]
    assert [*charts].index("rewards/margins") < [*charts].index("accuracy_se"), "pairs, then gauges"


def test_means_over_epochs_are_a_curve(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path
) -> None:
    """From the second epoch on, with the first one's mean at its own step."""
    status, _, err = alignkit(
        *quick("demo/sft.yaml", model_dir, hh, text),
        *("--trainer.max_steps", -1, "--trainer.max_epochs", 3),
        *("--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1),
    )
    assert status == 0, err
    accumulator = EventAccumulator("runs/demo/sft/version_0", size_guidance={"scalars": 0}).Reload()
    means = accumulator.Scalars("train/loss_epoch")
    assert len({point.step for point in means}) == 3
    losses = {point.step for point in accumulator.Scalars("train/loss")}
    assert {point.step for point in means} <= losses
    assert accumulator.Scalars("loss/SFT/train")


def test_the_settings_are_in_hparams_yaml(dpo: Path) -> None:
    held = yaml.safe_load((dpo / "hparams.yaml").read_text())
    assert held["lr"] == pytest.approx(1e-4)
    assert held["data/max_length"] == 128
    assert "hp_metric" not in held


def test_policies_are_printed(alignkit: Callable) -> None:
    """As the README says: with their defaults."""
    config = Path(__file__).parents[2] / "configs" / "dpo_hh_pythia.yaml"
    status, out, err = alignkit("fit", "--config", config, "--print_config")
    assert status == 0, err
    policies: dict[str, Any] = yaml.safe_load(out)["data"]["init_args"]["policies"]
    assert policies["empty_answers"] == "drop"
    status, out, err = alignkit(
        "fit", "--config", config, "--data.policies.empty_answers", "keep", "--print_config"
    )
    changed = yaml.safe_load(out)["data"]["init_args"]["policies"]
    assert changed == {**policies, "empty_answers": "keep"}
    status, out, err = alignkit(
        "fit", "--config", config, "--data.policies", "null", "--print_config"
    )
    assert status == 0, err


def test_a_relative_base_is_found_from_elsewhere_and_asked_for_once_it_has_moved(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    shutil.copytree(model_dir("llama"), "base")
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    status, _, err = alignkit(*arguments, "--model.base", "base")
    assert status == 0, err
    run = workplace / "runs" / "demo" / "sft"
    for form in ("peft", "safetensors"):
        status, _, err = alignkit("export", "--model", run, "--to", form, "--output", form)
        assert status == 0, err
    places = (run, workplace / "peft", workplace / "safetensors" / "adapter.safetensors")

    (workplace / "elsewhere").mkdir()
    os.chdir(workplace / "elsewhere")
    for place in places[:2]:
        load_policy(str(place))
    os.chdir(workplace)
    (workplace / "base").rename(workplace / "moved")
    for place in places[:2]:
        status, _, err = alignkit("generate", "--model", place, "--prompts", "Hi")
        assert status == 2
        line = err.strip().splitlines()[-1]
        assert f"its base model base is not at {workplace / 'base'} any more; pass --base" in line
    answer = ("--prompts", "Hi", "--max_new_tokens", 2, "--base", "moved")
    assert alignkit("generate", "--model", run, *answer)[0] == 0
