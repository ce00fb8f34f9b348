"""What a fine-tune changed inside a language model: Latent Scaling, verdicts, examples, reports.

Names are loaded when first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffing.latent_scaling import LatentScales, scale_latents
    from diffing.report import write_report
    from diffing.table import latent_table, scale_run
    from diffing.verdict import Thresholds

_HOMES = {
    "LatentScales": "latent_scaling",
    "Thresholds": "verdict",
    "latent_table": "table",
    "scale_latents": "latent_scaling",
    "scale_run": "table",
    "write_report": "report",
}

__all__ = ["LatentScales", "Thresholds", "latent_table", "scale_latents", "scale_run", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
