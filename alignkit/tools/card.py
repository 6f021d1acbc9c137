"""Write the card of an exported model: what it is, what it was trained on, and how well it did."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from alignkit.cli.config_file import read_config_file
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import read_checkpoint
from alignkit.models.export import ADAPTER_FILE, Format
from alignkit.models.find import find_checkpoint
from alignkit.models.gguf_file import GGUF_FILE
from alignkit.models.stamp import STAMP
from alignkit.tools.curves import read_scalars
from alignkit.utils.atomic import write_atomically

Kind = Format | Literal["reward"]
"""What `alignkit export --to` writes."""
CARD_FILE = "README.md"
_CONFIG_FILE = "config.yaml"
_USES: Mapping[Kind, str] = {
    "merged": """```python
from transformers import pipeline

ask = pipeline("text-generation", model=".")
print(ask("How do I keep bread fresh?", max_new_tokens=64)[0]["generated_text"])
```""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({quoted})
model = PeftModel.from_pretrained(base, ".")
```""",
    "safetensors": f"```sh\nalignkit generate --model {ADAPTER_FILE} --base {{shell}} \\\n"
    "  --prompts 'How do I keep bread fresh?'\n```",
    "reward": """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
rows = tokenizer("a prompt and its answer, put as in training", return_tensors="pt")
with torch.no_grad():
    print(model(**rows).logits)  # [1, 1]: the answer's reward
```""",
    "gguf": f"```sh\nllama-cli -m {GGUF_FILE}\n```",
}


@dataclass(frozen=True)
class Training:
    """Hold what a run left behind about itself.

    Example:
        >>> Training(module="alignkit.modules.sft.SFTModule", steps=32).stage
        'SFT'

    Attributes:
        module: The class that was trained, by its path; ``None`` where no checkpoint says.
        steps: Optimizer steps.
        config: The run's configuration, as ``fit`` wrote it.
        metrics: The last value of each quantity that a validation logged.
    """

    module: str | None = None
    steps: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def stage(self) -> str | None:
        """Return the stage's name: its class without ``Module``."""
        return self.module.rpartition(".")[2].removesuffix("Module") if self.module else None


def read_training(model: str) -> Training:
    """Read what a checkpoint and the files beside it say of its run."""
    path = Path(find_checkpoint(model))
    if path.suffix != ".ckpt":
        return Training()
    checkpoint = read_checkpoint(path)
    # Without our callback Lightning writes checkpoints into a folder of the run's own.
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    config = folder / _CONFIG_FILE
    try:
        scalars = read_scalars(folder)
    except AlignkitError:  # a run without TensorBoard
        scalars = {}
    return Training(
        module=checkpoint[STAMP]["module"],
        steps=checkpoint.get("global_step"),
        config=read_config_file(config) if config.is_file() else {},
        metrics={tag: points[-1][1] for tag, points in scalars.items() if tag.startswith("val/")},
    )


def write_card(model: str, directory: Path, to: Kind, *, base: str, dtype: str) -> None:
    """Write ``README.md`` with the Hub's header beside an export.

    Args:
        model: What was exported.
        directory: The export.
        to: Its format.
        base: Where its base lies; by its name on the Hub or a path.
        dtype: Of its weights.
    """
    training = read_training(model)
    text = model_card(training, directory.name, to, base=base, dtype=dtype)
    write_atomically(directory / CARD_FILE, text)


def model_card(training: Training, name: str, to: Kind, *, base: str, dtype: str) -> str:
    """Return the card's text.

    Args:
        training: What is known of the run.
        name: The model's name.
        to: The export's format.
        base: Where the base lies.
        dtype: Of the weights.
    """
    license_name = base_license(base)
    stage = training.stage
    header: dict[str, Any] = {"license": license_name} if license_name else {}
    if not Path(base).expanduser().exists():
        header["base_model"] = base
    header["library_name"] = "peft" if to in ("peft", "safetensors") else "transformers"
    header["pipeline_tag"] = "text-classification" if to == "reward" else "text-generation"
    header["tags"] = ["alignkit", *([stage.lower()] if stage else []), *(["gguf"] * (to == "gguf"))]
    version = importlib.metadata.version("alignkit")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        _summary(training, base, to, dtype, version),
        f"## Use\n\n{_USES[to].format(quoted=json.dumps(base), shell=shlex.quote(base))}",
    ]
    data = training.config.get("data")
    if data:
        parts.append(f"## Data\n\n{_fenced(data)}")
    if training.metrics:
        rows = [f"| {tag} | {value:.4g} |" for tag, value in sorted(training.metrics.items())]
        parts.append(
            "## Held-out metrics\n\n| metric | last value |\n|---|---:|\n" + "\n".join(rows)
        )
    told = license_name or "not found beside its files; look it up before you share this model"
    parts.append(f"## Licence\n\nThe base's licence: {told}.")
    if training.config:
        parts.append(
            "## Train it again\n\nSave this as `config.yaml` and run `alignkit fit --config "
            f"config.yaml`.\n\n{_fenced(training.config)}"
        )
    return "\n\n".join(parts) + "\n"


def base_license(base: str) -> str | None:
    """Return the licence that a base's own card names; nothing is downloaded.

    Args:
        base: A directory with a ``README.md``, or a Hub id whose card lies in the cache.

    Returns:
        The Hub's name of the licence, ``None`` where none is found.
    """
    card = Path(base).expanduser() / CARD_FILE
    if not card.is_file():
        try:
            cached = try_to_load_from_cache(base, CARD_FILE)
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    _, mark, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        header = yaml.safe_load(rest.partition("\n---")[0]) if mark else None
    except yaml.YAMLError:
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def _summary(training: Training, base: str, to: Kind, dtype: str, version: str) -> str:
    special = {
        "peft": "A LoRA adapter",
        "safetensors": "A LoRA adapter",
        "reward": "A reward model",
    }
    what = special.get(to, "A language model")
    if training.stage is None:
        return f"{what} over `{base}`, exported by alignkit {version} in {dtype}."
    steps = f" for {training.steps} steps" if training.steps else ""
    return (
        f"{what} over `{base}`, trained{steps} by `{training.module}` of alignkit {version}; "
        f"weights in {dtype}."
    )


def _fenced(values: object) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}```"
