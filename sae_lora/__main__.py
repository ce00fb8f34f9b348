"""`python -m sae_lora`: the console command `sae-lora`."""

import sys

from sae_lora.cli import main

sys.exit(main())
