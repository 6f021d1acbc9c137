"""SFT with LoRA: alignkit beside TRL + PEFT, on the same samples, adapters and steps.

    python benchmarks/sft.py --model DIR --data HH_DIR --json sft.json --plot sft.png

``trl`` is TRL as it comes: fp32 weights under bf16 autocast, gradient checkpointing on, padded
batches of random samples. ``trl_tuned`` has its weights in bf16, checkpointing off, samples sorted
by length, and each batch as one padding-free row.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from dpo import CONTEST, WANTED
from sidebyside.script import main

as_it_comes, tuned = CONTEST.peers
SFT = replace(CONTEST, task="sft", peers=(as_it_comes, replace(tuned, padding_free=True)))

if __name__ == "__main__":
    sys.exit(main(SFT, WANTED, "SFT: alignkit beside TRL + PEFT."))
