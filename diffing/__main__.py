"""`python -m diffing`: the console command `diffing`."""

import sys

from diffing.cli import main

sys.exit(main())
