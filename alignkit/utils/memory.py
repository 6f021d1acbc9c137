"""Measure the peak memory of this process: on a GPU by torch, else by the operating system.

Linux keeps a peak for each process, which can be reset. Other systems report the peak since the
start of the process.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Reset the peak, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(PermissionError):  # some sandboxes forbid it; the peak is then the process's
            _CLEAR.write_text(
                "5", encoding="ascii"
            )  # proc(5): the peak resident set size becomes the current one


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes allocated on the GPU, or resident on the host, since the reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_of_life()


def _peak_of_life() -> int:
    try:
        import resource
    except ImportError:  # Windows has none
        return _peak_on_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


class _ProcessMemoryCounters(ctypes.Structure):
    """Declare the structure PROCESS_MEMORY_COUNTERS of Windows' psapi.h."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("page_fault_count", ctypes.c_uint32),
        ("peak_working_set_size", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    )


def _peak_on_windows() -> int:
    counters = _ProcessMemoryCounters(cb=ctypes.sizeof(_ProcessMemoryCounters))
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo(
        ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(counters), counters.cb
    )
    return int(counters.peak_working_set_size)
