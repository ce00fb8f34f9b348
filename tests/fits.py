"""What tests of `sae-lora fit` open before they fit."""

from typing import Any

import torch

from sae_lora.dictionaries.controls import with_control
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.fitting.settings import FitConfig, pair_up


def opened(settings: FitConfig) -> Any:
    """Plan, model, dictionaries or controls, batches."""
    plan = make_plan(settings, settings.model, pair_up(settings.dictionary, settings.hook_point), settings.side)
    device = torch.device("cpu")
    dictionaries = with_control(load_dictionaries(plan, settings, device), settings.control, settings.seed)
    return plan, load_model(plan, settings, device), dictionaries, list(plan.batches(settings.batch_rows, device))
