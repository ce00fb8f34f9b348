"""`python -m crosscoders` and the console command `crosscoders`: Ctrl-C is one line from the first import on."""

import sys


def main() -> int:
    """Run the command and return its exit status."""
    try:
        from crosscoders.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
