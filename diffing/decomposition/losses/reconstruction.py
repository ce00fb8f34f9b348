"""What every reconstruction has in common: the distance of a masked model's outputs to the model's own, and sources.

A source in [0, 1] fills the gap above an importance: m_c = g_c + (1 - g_c) s_c. The last column is the remainder's mask
itself, whose importance is 0.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from crosscoders.models.predictions import kl, log_probs
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Masks


@runtime_checkable
class Task(Protocol):
    """What a model is asked, and how far two answers are apart."""

    def outputs(self, model: Any, batch: Any) -> Float[Tensor, "answers out"]:
        """Return the outputs that are compared."""

    def counted(self, batch: Any) -> Bool[Tensor, "*positions"]:
        """Return the positions whose importances count: all but padding."""

    def distance(self, target: Float[Tensor, "answers out"], out: Float[Tensor, "answers out"]) -> Float[Tensor, ""]:
        """Return the mean distance; the target has no gradient."""


def mean_kl(target: Float[Tensor, "tokens vocab"], out: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
    """Return KL(target || out) of logits, nats per token."""
    return kl(log_probs(target.detach()), log_probs(out)).mean()


def mean_square(target: Float[Tensor, "rows out"], out: Float[Tensor, "rows out"]) -> Float[Tensor, ""]:
    """Return the mean squared difference over all entries."""
    return functional.mse_loss(out, target.detach())


def masks_of(
    lower: Float[Tensor, "*positions components"],
    sources: Float[Tensor, "*sources components_and_one"],
    routed: Bool[Tensor, "*positions"] | None = None,
) -> Masks:
    """Return the masks of importances and sources; sources broadcast over positions."""
    return Masks(lower + (1 - lower) * sources[..., :-1], sources[..., -1], routed)


def reconstruction(
    decomposition: Decomposition, task: Task, batch: Any, target: Tensor, masks: Mapping[str, Masks]
) -> Float[Tensor, ""]:
    """Return the distance of the model with these masks to `target`."""
    with decomposition.masked(masks):
        return task.distance(target, task.outputs(decomposition.model, batch))
