"""End a process of a run on several without the interpreter's own end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress


def leave_group(status: int) -> None:
    """Exit at once where this process is one of several, once all that is due at exit is done.

    A thread of gloo may still be dropping a tensor of the last exchange. It waits for the
    interpreter's lock, and where the interpreter ends meanwhile, it aborts the process: a run that
    has done everything would end with 134, and an elastic launcher would start it again.

    Args:
        status: The exit status.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
