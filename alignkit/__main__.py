"""``alignkit`` and ``python -m alignkit``, which answer signals while they are being imported."""

import sys

from alignkit.utils.interrupts import leave_on_signals, stop_on_signals


def main() -> int:
    """Run the command line with the process's arguments; return its exit status."""
    with stop_on_signals():
        from alignkit.cli import main as run  # takes seconds

        status = run()
    leave_on_signals()
    return status


if __name__ == "__main__":
    sys.exit(main())
