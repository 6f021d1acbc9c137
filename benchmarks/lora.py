"""A LoRA step against full fine-tuning and against PEFT's, language modelling on GPT-2's shape.

    python benchmarks/lora.py --json lora.json --plot lora.png

bf16 autocast everywhere. ``full`` is alignkit's own full fine-tuning, from fp32 weights. ``peft``
is PEFT as it comes, in transformers' Trainer: autocast over fp32 weights. ``peft_bf16`` keeps the
frozen base in bf16 as alignkit does; alignkit's rounding is held against it.
"""

from __future__ import annotations

import sys

from sidebyside import summary
from sidebyside.experiment import Contest
from sidebyside.job import Arm
from sidebyside.plan import OURS
from sidebyside.script import main

CONTEST = Contest(
    task="lm",
    ours=Arm(OURS, "alignkit"),
    peers=(
        Arm("full", "alignkit", dtype="float32", adapters=False),
        Arm("peft", "peft", dtype="float32"),
        Arm("peft_bf16", "peft"),
    ),
    truth="peft",
    fair="peft_bf16",
)
WANTED = {
    "step_vs_full": ("full", summary.step),
    "peak_vs_full": ("full", summary.peak),
    "step_vs_peft": ("peft", summary.step),
    "peak_vs_peft": ("peft", summary.peak),
}

if __name__ == "__main__":
    sys.exit(main(CONTEST, WANTED, "LoRA: a step against full fine-tuning and against PEFT."))
