"""The start of a console command: Ctrl-C is one line from the first import on."""

import sys


def run_program(module: str) -> int:
    """Import the command line of a package, run it, and return its exit status."""
    try:
        import importlib

        status: int = importlib.import_module(module).main()
        return status
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
