"""`python -m sae_lora` and the console command `sae-lora`: Ctrl-C is one line from the first import on."""

import sys


def main() -> int:
    """Run the command and return its exit status."""
    try:
        from sae_lora.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
