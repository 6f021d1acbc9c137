"""Run the command line for ``alignkit`` and ``python -m alignkit``.

The signal handlers are installed before the packages are imported, which takes seconds.
"""

import sys

from alignkit.utils.interrupts import exit_on_signals, stop_on_signals
from alignkit.utils.leaving import leave_group


def main() -> int:
    """Run the command line with the process's arguments and return its exit status."""
    with stop_on_signals():
        from alignkit.cli import main as run  # takes seconds

        status = run()
    exit_on_signals()
    leave_group(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
