"""`sae-lora fit`, as a function of its settings that returns a JSON object."""

import shlex
import time
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing
from crosscoders.training.checkpoint import RunRecord
from sae_lora.fitting.loop import fit
from sae_lora.fitting.settings import FitConfig, FitSettings


def fit_command(settings: FitSettings) -> dict[str, Any]:
    """Run `sae-lora fit`."""
    started = time.perf_counter()
    config = config_of(FitConfig, settings)
    folder = fit(config, settings.out, force=settings.force)
    say_closing(started, f"adapter in {folder}")
    say(f"next: sae-lora eval {shlex.quote(settings.out)} --data HELD_OUT")
    n_tokens = files.read_model(Path(settings.out) / "run.json", RunRecord)["inputs"]["tokens"]["n"]
    return result("fit", to_dict(config), [row("fit.tokens", n_tokens, "tokens", n_tokens)])
