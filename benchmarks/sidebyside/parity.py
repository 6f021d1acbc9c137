"""The gate: arms that do not train the same thing are not compared.

Two questions, over the same short examples, adapters and optimizer steps:

* In fp32, do alignkit and the peer agree? log π(y|x) of every response before training and the
  loss of every step, relative difference at most `FP32_LIMIT`.
* In bf16, is alignkit no further from the fp32 truth than the peer is? Root mean squares of the
  error in log π(y|x) and in the loss. The fair peer keeps its base in bf16 as alignkit does: one
  with fp32 weights under autocast adds up its residual stream in fp32, and pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FP32_LIMIT = 1e-3
GROSS = 20
"""Rounding differs between arms by small factors; further off, an arm computes something else."""


@dataclass(frozen=True)
class Trace:
    """What one arm computed.

    Attributes:
        logps: log π(y|x) of every response, before training.
        losses: Of every step.
    """

    logps: Sequence[float]
    losses: Sequence[float]


def judge(
    truth: Trace,
    ours_fp32: Trace,
    ours_bf16: Trace | None = None,
    peers_bf16: Mapping[str, Trace] | None = None,
    fair: str = "",
    *,
    peers_fp32: Mapping[str, Trace] | None = None,
) -> dict[str, Any]:
    """Compare traces.

    Args:
        truth: The peer in fp32.
        ours_fp32: alignkit in fp32.
        ours_bf16: alignkit as it is timed; ``None`` where that is in fp32.
        peers_bf16: The peers as they are timed.
        fair: The peer that keeps its base in bf16.
        peers_fp32: The other peers where they are timed in fp32.

    Returns:
        Plain values: ``passed``, what was found, and ``failures``, one line each.
    """
    fp32 = {
        "limit": FP32_LIMIT,
        "logps_max_relative": max_relative(ours_fp32.logps, truth.logps),
        "losses_max_relative": max_relative(ours_fp32.losses, truth.losses),
    }
    failures = [
        f"fp32 {name}: {arm} is off by {off:.2g}, limit {FP32_LIMIT:g}"
        for arm, trace in {"alignkit": ours_fp32, **(peers_fp32 or {})}.items()
        for name, off in (
            ("logps", max_relative(trace.logps, truth.logps)),
            ("losses", max_relative(trace.losses, truth.losses)),
        )
        if not off <= FP32_LIMIT
    ]
    traces = {} if ours_bf16 is None else {"alignkit": ours_bf16, **(peers_bf16 or {})}
    bf16: dict[str, Any] = {
        arm: {
            "logps_rms_error": rms(trace.logps, truth.logps),
            "losses_rms_error": rms(trace.losses, truth.losses),
        }
        for arm, trace in traces.items()
    }
    for name, count in (("logps", len(truth.logps)), ("losses", len(truth.losses))):
        if not bf16:
            break
        ours, theirs = bf16["alignkit"][f"{name}_rms_error"], bf16[fair][f"{name}_rms_error"]
        if not ours <= theirs * sampling_slack(count):
            failures.append(f"bf16 {name}: alignkit is off by {ours:.2g}, {fair} by {theirs:.2g}")
    for name in ("logps", "losses"):
        errors = {arm: found[f"{name}_rms_error"] for arm, found in bf16.items()}
        least = min(errors.values(), default=0.0)
        failures += [
            f"bf16 {name}: {arm} is off by {error:.2g}, the closest arm by {least:.2g}"
            for arm, error in errors.items()
            if not error <= GROSS * least
        ]
    return {
        "passed": not failures,
        "failures": failures,
        "responses": len(truth.logps),
        "steps": len(truth.losses),
        "fp32": fp32,
        "bf16": bf16,
        "bf16_compared_with": fair,
    }


def max_relative(values: Sequence[float], truth: Sequence[float]) -> float:
    """Largest |value − truth| / |truth|; NaN where a value is missing or not finite."""
    if len(values) != len(truth):
        return float("nan")
    found, right = np.asarray(values, float), np.asarray(truth, float)
    return float(np.max(np.abs(found - right) / np.abs(right)))


def rms(values: Sequence[float], truth: Sequence[float]) -> float:
    """Root mean square of the differences; NaN where a value is missing or not finite."""
    if len(values) != len(truth):
        return float("nan")
    return float(np.sqrt(np.mean((np.asarray(values, float) - np.asarray(truth, float)) ** 2)))


def sampling_slack(count: int) -> float:
    """By how much two equally good arms may differ: two standard errors of a ratio of RMS values.

    An RMS over n normal errors has the relative standard error 1/√(2n), a ratio of two 1/√n.
    """
    return 1 + 2 / count**0.5
