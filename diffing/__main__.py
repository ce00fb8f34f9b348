"""`python -m diffing` and the console command `diffing`: Ctrl-C is one line from the first import on."""

import sys


def main() -> int:
    """Run the command and return its exit status."""
    try:
        from diffing.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
