"""`python -m diffing` and the console command `diffing`."""

import sys

from crosscoders.common.start import run_program


def main() -> int:
    """Run the command and return its exit status."""
    return run_program("diffing.cli")


if __name__ == "__main__":
    sys.exit(main())
