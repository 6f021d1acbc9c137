"""Compare `alignkit plan` with the measured peak of the same run, each in a process of its own.

    python benchmarks/plan.py --json plan.json

Shapes are small enough for a CPU and dominated by activations. The measured peak is the most memory
that the process had during setup and three optimizer steps, above what it had with everything
imported and no model; the same is taken off the planned peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 1024},
    "gpt_neox": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 1024,
    },
    "llama": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    },
}  # fmt: skip
VOCABULARY = 8192
LENGTH = 256


@dataclass(frozen=True)
class Case:
    """One run: a shape, a stage and how it trains."""

    shape: str
    stage: str
    tokens: int
    precision: str = "32-true"
    dtype: str = "float32"
    quantize: str | None = None
    lora: bool = True
    checkpointing: bool = False

    def arguments(self, base: str) -> list[str]:
        """Return the command line of `alignkit plan`."""
        data = "HHPreferenceDataModule" if self.stage == "DPOModule" else "HHSFTDataModule"
        model = {
            "base": base,
            "random_init": True,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "activation_checkpointing": self.checkpointing,
            "lora": {"targets": "all-linear"} if self.lora else None,
        }
        rest = {
            "model": {"class_path": f"alignkit.{self.stage}", "init_args": model},
            "data": {
                "class_path": f"alignkit.{data}",
                "init_args": {"tokens_per_batch": self.tokens, "max_length": LENGTH},
            },
            "trainer": {"precision": self.precision, "accelerator": "cpu", "devices": 1},
        }
        return ["--config", json.dumps(rest)]


CASES = [
    *(
        Case(shape, stage, tokens)
        for shape in SHAPES
        for stage in ("SFTModule", "DPOModule")
        for tokens in (1024, 4096)
    ),
    *(Case(shape, "SFTModule", 2048, lora=False) for shape in SHAPES),
    *(Case(shape, "SFTModule", 4096, checkpointing=True) for shape in SHAPES),
    *(Case("llama", "DPOModule", 2048, quantize=packed) for packed in ("int8", "nf4")),
    Case("llama", "DPOModule", 1024, "bf16-mixed", "bfloat16"),
    Case("llama", "DPOModule", 1024, "bf16-mixed"),
]


def save_shape(name: str, directory: Path) -> str:
    from transformers import AutoConfig

    place = directory / name
    if not place.exists():
        AutoConfig.for_model(name, vocab_size=VOCABULARY, **SHAPES[name]).save_pretrained(place)
    return str(place)


def planned(case: Case, base: str) -> dict[str, Any]:
    """Return what `alignkit plan` writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "alignkit", "plan", *case.arguments(base)]
        done = subprocess.run([*command, "--json", str(place)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return dict(json.loads(place.read_text()))


def measured(case: Case, base: str) -> dict[str, int]:
    """Return the peak of the run in a process of its own, and what it had before."""
    given = json.dumps({"case": asdict(case), "base": base})
    done = subprocess.run(
        [sys.executable, __file__, "--worker"], input=given, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def work() -> None:
    """Train three steps, and print the process's memory before the model and at its peak."""
    import torch
    from lightning import Trainer
    from torch.utils.data import DataLoader

    import alignkit
    from alignkit.lora import LoRAConfig
    from alignkit.tools.plan.command import parse, resident_bytes
    from alignkit.tools.plan.settings import read_settings
    from alignkit.tools.plan.step import row_of
    from alignkit.utils.memory import peak_bytes, reset_peak

    given = json.load(sys.stdin)
    case, device = Case(**given["case"]), torch.device("cpu")
    batch = row_of(read_settings(parse(case.arguments(given["base"]))), case.tokens)
    if case.quantize:
        import bitsandbytes  # noqa: F401
    reset_peak(device)
    before = resident_bytes()
    module = getattr(alignkit, case.stage)(
        base=given["base"],
        random_init=True,
        dtype=case.dtype,
        quantize=case.quantize,
        activation_checkpointing=case.checkpointing,
        lora=LoRAConfig(targets="all-linear") if case.lora else None,
    )
    trainer = Trainer(
        max_steps=3, precision=case.precision, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, barebones=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))  # type: ignore[arg-type]
    print(json.dumps({"before": before, "peak": peak_bytes(device), "tokens": batch.num_tokens}))


def compare(case: Case, directory: Path) -> dict[str, Any]:
    """Return a case with its planned and measured peak above the process itself, in bytes."""
    base = save_shape(case.shape, directory)
    plan, found = planned(case, base), measured(case, base)
    ours, theirs = (peak - found["before"] for peak in (plan["bytes"]["peak"], found["peak"]))
    return {**asdict(case), "planned": ours, "measured": theirs, "ratio": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="cases whose description holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if options.only not in str(case):
                continue
            row = compare(case, Path(folder))
            results.append(row)
            print(
                f"{case.shape:9} {case.stage:10} {case.tokens:5} {case.precision:10} {case.dtype:8}"
                f" {case.quantize or '-':5} {'LoRA' if case.lora else 'full'}"
                f" {'again' if case.checkpointing else '-':6}"
                f" planned {row['planned'] / 2**20:6.0f} MiB measured"
                f" {row['measured'] / 2**20:6.0f} MiB ratio {row['ratio']:.2f}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
