"""Figures of Minder et al. 2025, arXiv 2504.02922, for Gemma-2-2B and its chat version, by row name.

Names are without `chat-pair.`. Layer 13, 73,728 latents, 512 chats; read from secondary sources, so those with "about"
are approximate. The halves are of the 3,176 latents of largest relative norm, ours of all that are at least as strong
in the tuned model as in the base.
"""

_COUNTS = "class sizes"
_SCALING = "Latent Scaling"
_CAUSAL = "causality experiment"

PUBLISHED: dict[str, tuple[str, str]] = {
    "l1.fve.tuned": ("0.846 (both models)", "training"),
    "batchtopk.fve.tuned": ("0.876 (both models)", "training"),
    "l1.tuned-only.count": ("3,176", _COUNTS),
    "batchtopk.tuned-only.count": ("134", _COUNTS),
    "l1.base-only.count": ("1,437", _COUNTS),
    "batchtopk.base-only.count": ("5", _COUNTS),
    "l1.shared-norm.count": ("53,569", _COUNTS),
    "batchtopk.shared-norm.count": ("62,373", _COUNTS),
    "l1.nu_reconstruction.tuned-only.within_shared": ("0.18", _SCALING),
    "batchtopk.nu_reconstruction.top_32_norm.within_shared": ("0 (first 3,176 by norm)", _SCALING),
    "l1.kl.none": ("0.482", _CAUSAL),
    "batchtopk.kl.none": ("0.482", _CAUSAL),
    "l1.kl.none.first_9": ("1.69", _CAUSAL),
    "batchtopk.kl.none.first_9": ("1.69", _CAUSAL),
    "l1.share_closed.all": ("about 0.59", _CAUSAL),
    "batchtopk.share_closed.all": ("about 0.59", _CAUSAL),
    "l1.share_closed.all.first_9": ("about 0.78", _CAUSAL),
    "batchtopk.share_closed.all.first_9": ("about 0.78", _CAUSAL),
    "batchtopk.share_closed.error.first_9": ("about 0.45", _CAUSAL),
    "l1.kl.best_half.norm": ("0.241", _CAUSAL),
    "l1.kl.worst_half.norm": ("0.242", _CAUSAL),
    "l1.kl.best_half.norm.first_9": ("0.619", _CAUSAL),
    "l1.kl.worst_half.norm.first_9": ("0.740", _CAUSAL),
    "batchtopk.kl.best_half.norm": ("0.230", _CAUSAL),
    "batchtopk.kl.worst_half.norm": ("0.267", _CAUSAL),
    "batchtopk.share_closed.best_half.norm.first_9": ("about 0.50", _CAUSAL),
    "batchtopk.share_closed.worst_half.norm.first_9": ("about 0.06", _CAUSAL),
    "l1.kl.template": ("0.239", _CAUSAL),
    "batchtopk.kl.template": ("0.239", _CAUSAL),
    "l1.kl.template.first_9": ("0.507", _CAUSAL),
    "batchtopk.kl.template.first_9": ("0.507", _CAUSAL),
}
"""Value, and the part of the paper that it is from."""


def note(name: str) -> str | None:
    """Return what stands beside a row."""
    if name not in PUBLISHED:
        return None
    value, part = PUBLISHED[name]
    return f"published: {value} (Minder et al. 2025, arXiv 2504.02922, {part})"
