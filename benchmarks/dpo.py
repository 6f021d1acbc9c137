"""DPO with LoRA: alignkit beside TRL + PEFT, on the same pairs, adapters and steps.

    python benchmarks/dpo.py --model DIR --data HH_DIR --json dpo.json --plot dpo.png

``trl`` is TRL as it comes: fp32 weights under bf16 autocast, gradient checkpointing on, batches
of random pairs. ``trl_tuned`` is what a careful user makes of it: weights in bf16, checkpointing
off, pairs sorted by length (its DPO has no padding-free path). Both are given a PEFT model with a
trained adapter, for which TRL takes a copy of that adapter as the reference, as alignkit does.
"""

from __future__ import annotations

import sys

from sidebyside import summary
from sidebyside.experiment import Contest
from sidebyside.job import Arm
from sidebyside.plan import OURS
from sidebyside.script import main

CONTEST = Contest(
    task="dpo",
    ours=Arm(OURS, "alignkit"),
    peers=(
        Arm("trl", "trl", dtype="float32", checkpointing=True),
        Arm("trl_tuned", "trl", by_length=True),
    ),
    truth="trl",
    fair="trl_tuned",
)
WANTED = {
    "speed_vs_trl": ("trl", summary.speed),
    "speed_vs_trl_tuned": ("trl_tuned", summary.speed),
    "peak_vs_trl": ("trl", summary.peak),
    "peak_vs_trl_tuned": ("trl_tuned", summary.peak),
}

if __name__ == "__main__":
    sys.exit(main(CONTEST, WANTED, "DPO: alignkit beside TRL + PEFT."))
