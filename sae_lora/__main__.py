"""`python -m sae_lora` and the console command `sae-lora`."""

import sys

from crosscoders.common.start import run_program


def main() -> int:
    """Run the command and return its exit status."""
    return run_program("sae_lora.cli")


if __name__ == "__main__":
    sys.exit(main())
