"""What a fine-tune changed inside a language model: Latent Scaling, verdicts, partners, twins, patching, reports.

Names are loaded when first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

from crosscoders.lazy import loader

if TYPE_CHECKING:
    from diffing.causal import measure
    from diffing.causal_data import read_chats
    from diffing.causal_sets import choose_sets
    from diffing.latent_scaling import LatentScales, scale_latents
    from diffing.lens import logit_lens
    from diffing.partners import with_partners
    from diffing.report import write_report
    from diffing.steering import steered, steering_vector
    from diffing.table import latent_table, scale_run
    from diffing.twins import twin_pairs
    from diffing.verdict import Thresholds

_HOMES = {
    "LatentScales": "latent_scaling",
    "Thresholds": "verdict",
    "choose_sets": "causal_sets",
    "latent_table": "table",
    "logit_lens": "lens",
    "measure": "causal",
    "read_chats": "causal_data",
    "scale_latents": "latent_scaling",
    "scale_run": "table",
    "steered": "steering",
    "steering_vector": "steering",
    "twin_pairs": "twins",
    "with_partners": "partners",
    "write_report": "report",
}

__all__ = [
    "LatentScales",
    "Thresholds",
    "choose_sets",
    "latent_table",
    "logit_lens",
    "measure",
    "read_chats",
    "scale_latents",
    "scale_run",
    "steered",
    "steering_vector",
    "twin_pairs",
    "with_partners",
    "write_report",
]


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
