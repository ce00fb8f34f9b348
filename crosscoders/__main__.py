"""`python -m crosscoders`: the console command `crosscoders`."""

import sys

from crosscoders.cli import main

sys.exit(main())
