"""What a fine-tune changed inside a language model: Latent Scaling, verdicts, partners, twins, patching, reports.

Names are loaded when first used, so that importing the package costs nothing.
"""

from crosscoders.common.lazy import loader

TYPE_CHECKING = False  # for typing.TYPE_CHECKING, whose import is a third of a command's start
if TYPE_CHECKING:
    from crosscoders.text.chats import read_chats
    from diffing.causal.lens import logit_lens
    from diffing.causal.patching import measure
    from diffing.causal.sets import choose_sets
    from diffing.causal.steering import steered, steering_vector
    from diffing.explorer.session import Session
    from diffing.latents.latent_scaling import LatentScales, scale_latents
    from diffing.latents.partners import with_partners
    from diffing.latents.table import latent_table, scale_run
    from diffing.latents.twins import twin_pairs
    from diffing.latents.verdict import Thresholds
    from diffing.report.publishing import write_report
    from diffing.sharing.pushing import push_to_hub

_HOMES = {
    "LatentScales": "diffing.latents.latent_scaling",
    "Session": "diffing.explorer.session",
    "Thresholds": "diffing.latents.verdict",
    "choose_sets": "diffing.causal.sets",
    "latent_table": "diffing.latents.table",
    "logit_lens": "diffing.causal.lens",
    "measure": "diffing.causal.patching",
    "push_to_hub": "diffing.sharing.pushing",
    "read_chats": "crosscoders.text.chats",
    "scale_latents": "diffing.latents.latent_scaling",
    "scale_run": "diffing.latents.table",
    "steered": "diffing.causal.steering",
    "steering_vector": "diffing.causal.steering",
    "twin_pairs": "diffing.latents.twins",
    "with_partners": "diffing.latents.partners",
    "write_report": "diffing.report.publishing",
}

__all__ = [
    "LatentScales",
    "Session",
    "Thresholds",
    "choose_sets",
    "latent_table",
    "logit_lens",
    "measure",
    "push_to_hub",
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
