"""`python -m crosscoders` and the console command `crosscoders`."""

import sys

from crosscoders.common.start import run_program


def main() -> int:
    """Run the command and return its exit status."""
    return run_program("crosscoders.cli")


if __name__ == "__main__":
    sys.exit(main())
