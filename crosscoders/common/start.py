"""The start of a console command: Ctrl-C is one line from the first import on, and threads wait without a core."""

import os
import sys

SPINS = "1000"
"""How often a thread of torch's looks whether the others are done before it sleeps. The default of OpenMP waits for a
scheduler's time slice where another program holds a core: 16 ms an operation, in place of .1."""


def run_program(module: str) -> int:
    """Import the command line of a package, run it, and return its exit status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        import importlib

        status: int = importlib.import_module(module).main()
        return status
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
