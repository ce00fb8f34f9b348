r"""Paired activations with known features: what a crosscoder and its scores should find.

Feature i writes the vector v_i^m in model m (0 = base, 1 = tuned), with activation s_ni >= 0 on token n:

    x_nm = bias_m + sum_i s_ni v_i^m + noise * N(0, I)
    s_ni = fires_ni * magnitude_ni,   magnitude_ni = exp(magnitude_sigma * N(0, 1))

fires: a feature without a parent is on with its own frequency p, independently; a feature with a parent is on with
probability `child_rate` where its parent is on, and nowhere else. p of rank r is proportional to 1 / (r + 20)
(Zipf-Mandelbrot; the offset keeps the commonest below 15%), scaled so that all p add up to `l0`; ranks are dealt at
random. Directions u are uniform on the unit sphere.

    class       v^base                       v^tuned   said to be
    shared      u                            u
    tuned-only  0                            u         the only true positives
    base-only   u                            0
    rotated     u'                           u         one concept, two unrelated directions
    rescaled    gain * u                     u         the case of Complete Shrinkage
    split       (u + u') / ||u + u'||        u         two features share one tuned direction: the base model tells
                                                       apart what the tuned model does not (Latent Decoupling)
    recomposed  (u_a + u_b) / ||u_a + u_b||  u         the base model writes it with directions of two shared features

`child_share` of the features that are not shared have a shared parent. `make_truth` draws the features, `sample` draws
tokens. Both are pure functions of their seed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders.common.errors import InputError

CLASSES = ("shared", "tuned-only", "base-only", "rotated", "rescaled", "split", "recomposed")
ZIPF_OFFSET = 20


@dataclass(frozen=True)
class PlantedConfig:
    """Size and statistics of planted activations."""

    d_model: int = 64
    """Width of the activations."""
    n_shared: int = 100
    """Features with one direction in both models."""
    n_tuned_only: int = 20
    """Features of the tuned model alone."""
    n_base_only: int = 16
    """Features of the base model alone."""
    n_rotated: int = 12
    """Features with unrelated directions."""
    n_rescaled: int = 24
    """Features that the base model writes with less gain; `gains` are dealt out in turn."""
    n_split: int = 16
    """Features in pairs that share their tuned direction; even."""
    n_recomposed: int = 12
    """Features that the base model writes with directions of two shared ones."""
    gains: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    """Norm of the base vector over that of the tuned one."""
    l0: float = 6.0
    """Sum of the frequencies before children are tied to their parents."""
    child_share: float = 0.5
    """Share of the features other than shared that fire only under a shared parent."""
    child_rate: float = 0.5
    """Share of the parent's tokens on which a child fires."""
    magnitude_sigma: float = 0.5
    """Standard deviation of the logarithm of the magnitudes; their median is 1."""
    bias_norm: float = 1.0
    """Norm of the constant part of each model, in an independent direction."""
    noise: float = 0.03
    """Standard deviation of the noise in each dimension."""

    def __post_init__(self) -> None:
        if self.n_split % 2:
            raise InputError(f"n_split is {self.n_split}; split features come in pairs. Give an even number.")
        if self.n_shared < 2:
            raise InputError(f"n_shared is {self.n_shared}; parents and recomposed features need at least 2.")

    def counts(self) -> dict[str, int]:
        """Return features of each class, in the order of the truth table."""
        return {name: int(getattr(self, "n_" + name.replace("-", "_"))) for name in CLASSES}


class Truth(NamedTuple):
    """What was planted."""

    config: PlantedConfig
    table: pandas.DataFrame
    """One row per feature: class, gain (norm of v^base over v^tuned, inf for base-only), cosine (of the two, 0 where
    one is 0), frequency (share of tokens), parent (-1: none)."""
    vectors: Float[Tensor, "features 2 d_model"]
    """v_i^m, units of x."""
    bias: Float[Tensor, "2 d_model"]


class Sample(NamedTuple):
    """Tokens drawn from a truth."""

    x: Float[Tensor, "tokens 2 d_model"]
    activations: Float[Tensor, "tokens features"]
    """s_ni >= 0."""


def make_truth(config: PlantedConfig, seed: int) -> Truth:
    """Draw the features."""
    g = torch.Generator().manual_seed(seed)
    counts = config.counts()
    classes = np.repeat(list(counts), list(counts.values()))
    n, d = len(classes), config.d_model
    vectors = unit_vectors(n, d, g)[:, None].repeat(1, 2, 1)
    base, tuned = vectors[:, 0], vectors[:, 1]
    where = {name: torch.from_numpy(np.flatnonzero(classes == name)) for name in CLASSES}
    base[where["tuned-only"]] = 0
    tuned[where["base-only"]] = 0
    base[where["rotated"]] = unit_vectors(counts["rotated"], d, g)
    gains = torch.tensor(config.gains).repeat(counts["rescaled"])[: counts["rescaled"]]
    base[where["rescaled"]] *= gains[:, None]
    tuned[where["split"][1::2]] = tuned[where["split"][::2]]
    base[where["split"]] = normalize(tuned[where["split"]] + unit_vectors(counts["split"], d, g), dim=1)
    for i in where["recomposed"]:
        a, b = torch.randperm(config.n_shared, generator=g)[:2]
        base[i] = normalize(base[a] + base[b], dim=0)

    rank = torch.randperm(n, generator=g)
    frequency = 1 / (rank.double() + ZIPF_OFFSET + 1)
    frequency *= config.l0 / frequency.sum()
    parent = torch.randint(config.n_shared, (n,), generator=g)
    others = torch.arange(config.n_shared, n)
    orphans = others[torch.rand(len(others), generator=g) >= config.child_share]
    parent[: config.n_shared] = parent[orphans] = -1
    child = parent >= 0
    frequency[child] = config.child_rate * frequency[parent[child]]

    norms = vectors.norm(dim=2)
    table = pandas.DataFrame(
        {
            "class": classes,
            "gain": (norms[:, 0] / norms[:, 1]).double().numpy().round(6),
            "cosine": torch.nn.functional.cosine_similarity(base, tuned, dim=1).numpy(),
            "frequency": frequency.numpy(),
            "parent": parent.numpy(),
        }
    )
    table.index.name = "feature"
    return Truth(config, table, vectors, config.bias_norm * unit_vectors(2, d, g))


def sample(truth: Truth, n_tokens: int, seed: int, *, chunk: int = 20_000) -> Sample:
    """Draw tokens; `chunk` of them at a time, so that no temporary is larger than the result."""
    g = torch.Generator().manual_seed(seed)
    config = truth.config
    frequency = torch.tensor(truth.table["frequency"].to_numpy(), dtype=torch.float32)
    parent = torch.tensor(truth.table["parent"].to_numpy())
    child = parent >= 0
    rate = torch.where(child, config.child_rate, frequency)
    x, activations = [], []
    for start in range(0, n_tokens, chunk):
        shape = (min(chunk, n_tokens - start), len(rate))
        fires = torch.rand(shape, generator=g) < rate
        fires[:, child] &= fires[:, parent[child]]  # parents have no parents, so one step is enough
        s = fires * (config.magnitude_sigma * torch.randn(shape, generator=g)).exp()
        clean = (s @ truth.vectors.flatten(1)).unflatten(1, (2, -1)) + truth.bias
        x.append(clean + config.noise * torch.randn(clean.shape, generator=g))
        activations.append(s)
    return Sample(torch.cat(x), torch.cat(activations))


def unit_vectors(n: int, d: int, g: torch.Generator) -> Float[Tensor, "n d"]:
    """Return directions that are uniform on the unit sphere."""
    return normalize(torch.randn(n, d, generator=g), dim=1)
