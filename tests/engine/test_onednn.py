"""The library of CPU products forgets shapes that do not come again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from alignkit.engine.onednn import LIMITS, PRODUCTS

# One shape more than may be kept, then the first again.
PROGRAM = f"""
import torch, alignkit.engine
for rows in [*range(100, {101 + PRODUCTS}), 100]:
    torch.ones(rows, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
"""


def compiled(**environment: str) -> int:
    """Run `PROGRAM`, and count the products that were compiled."""
    inherited = {name: value for name, value in os.environ.items() if name not in LIMITS}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, "ONEDNN_VERBOSE": "profile_create", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.count("create:cache_miss")


def test_a_shape_is_forgotten_after_so_many_others_unless_told_otherwise() -> None:
    default = compiled()
    if default == 0:
        pytest.skip("this processor multiplies bf16 without oneDNN")
    assert default == PRODUCTS + 2
    assert compiled(**dict.fromkeys(LIMITS, "1024")) == PRODUCTS + 1
