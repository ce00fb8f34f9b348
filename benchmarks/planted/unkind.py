r"""The unkind world: planted activations with what real ones have and `generator` leaves out.

    x_nm = outlier_n (mean_m + sum_i s_ni v_i^m + z_n A + noise * N(0, I))
    s_ni = fires_ni * magnitude_ni,   magnitude_ni Pareto with index `tail`, median 1

Topics: a token has one of `n_topics`, the commonest most often; most features have a home topic, in which they fire
`topic_lift` times as often as outside it. Frequencies follow 1 / (rank + 10). z_n A is dense noise, the same in both
models, in `n_noise` directions of falling size; the last term is each model's own. The mean is as long as the signal
without it is on average, nearly the same in both models. outlier_n is `outlier_length` on a share of `outlier_share`
of the tokens, else 1.

    kind         class        v^base      v^tuned   fires
    shared       shared       u           u         alone
    tuned-only   tuned-only   0           u         alone
    child        tuned-only   0           u         on `child_rate` of its shared parent's tokens, nowhere else
    pair         tuned-only   0           u         always together with the other one of its pair
    tied         tuned-only   0           u         always together with a shared feature, its parent: no dictionary
                                                    need tell the two apart
    base-only    base-only    u           0         alone
    rotated      rotated      u'          u         alone
    rescaled     rescaled     gain * u    u         alone
    divided      divided      u           w         one concept of the base model that splits: on each of its tokens one
                                                    of the two features of a pair fires; they share u and have a w each

Class is what scores go by, kind what recall is reported by. `make_world` draws the features, `sample` draws tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks.planted.generator import Sample, unit_vectors
from crosscoders.common.errors import InputError

KINDS = ("shared", "tuned-only", "child", "pair", "tied", "base-only", "rotated", "rescaled", "divided")
TUNED_ONLY = ("tuned-only", "child", "pair", "tied")
"""Kinds of class tuned-only."""
FREQUENCY_OFFSET = 10
HOMELESS = 0.3
"""Share of the features that fire in all topics alike."""


@dataclass(frozen=True)
class UnkindConfig:
    """Size and statistics of the unkind world."""

    d_model: int = 192
    n_shared: int = 186
    n_tuned_only: int = 52
    n_child: int = 12
    n_pair: int = 8
    n_tied: int = 6
    n_base_only: int = 24
    n_rotated: int = 24
    n_rescaled: int = 24
    n_divided: int = 64
    gains: tuple[float, ...] = (0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
    """Norm of the base vector over that of the tuned one, dealt out in turn."""
    divided_cosines: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    """Of the base and the tuned vector, dealt out in turn to pairs of divided features."""
    divided_shares: tuple[float, ...] = (0.5, 0.7, 0.85)
    """Of the concept's tokens on which the first of the pair fires, dealt out in turn."""
    l0: float = 15.0
    """Active features per token, before topics cut the commonest ones at 95%."""
    child_rate: float = 0.4
    n_topics: int = 16
    topic_lift: float = 6.0
    tail: float = 3.0
    """Index of the Pareto magnitudes; at 3 their variance is finite and their fourth moment is not."""
    mean_length: float = 1.0
    """Of the mean, in root mean squares of the signal."""
    n_noise: int = 48
    shared_noise: float = 0.3
    """Root mean square of z A, in root mean squares of the signal."""
    noise: float = 0.05
    """Standard deviation of each model's own noise in each dimension."""
    outlier_share: float = 0.0
    outlier_length: float = 100.0

    def __post_init__(self) -> None:
        for name in ("n_pair", "n_divided"):
            if getattr(self, name) % 2:
                raise InputError(f"{name} is {getattr(self, name)}; these come in twos. Give an even number.")

    def counts(self) -> dict[str, int]:
        """Return features of each kind, in the order of the table."""
        return {kind: int(getattr(self, "n_" + kind.replace("-", "_"))) for kind in KINDS}

    def topic_shares(self) -> Float[Tensor, " topics"]:
        """Return the share of tokens of each topic."""
        shares = 1 / (torch.arange(self.n_topics) + 3.0)
        return shares / shares.sum()

    def signal(self) -> float:
        """Return the root mean square of the signal: directions are nearly orthogonal, so squares add up."""
        # E magnitude^2 of a Pareto scaled to median 1
        return (self.l0 * self.tail / (self.tail - 2) / 4 ** (1 / self.tail)) ** 0.5


class World(NamedTuple):
    """What was planted."""

    config: UnkindConfig
    table: pandas.DataFrame
    """One row per feature: class, kind, gain (norm of v^base over v^tuned, inf for base-only), cosine (of the two, 0
    where one is 0), frequency (share of tokens), parent (of a child or tied
    feature) and other (of a pair or a divided concept); -1: none."""
    vectors: Float[Tensor, "features 2 d_model"]
    bias: Float[Tensor, "2 d_model"]
    """The mean of each model without the features' own means."""
    rates: Float[Tensor, "topics features"]
    """Chance to fire on a token of the topic; of a child, of its parent; of a divided feature, of its concept."""
    noise: Float[Tensor, "factors d_model"]
    """A."""


def make_world(config: UnkindConfig, seed: int) -> World:
    """Draw the features."""
    g = torch.Generator().manual_seed(seed)
    counts = config.counts()
    kinds = np.repeat(list(counts), list(counts.values()))
    rows = {kind: torch.from_numpy(np.flatnonzero(kinds == kind)) for kind in KINDS}
    vectors = _vectors(config, rows, g)
    parent, other = torch.full((2, len(kinds)), -1)
    parents = torch.randperm(config.n_shared, generator=g)  # none has two children
    parent[rows["child"]], parent[rows["tied"]] = (
        parents[: counts["child"]],
        parents[counts["child"] :][: counts["tied"]],
    )
    for kind in ("pair", "divided"):
        other[rows[kind]] = rows[kind].view(-1, 2).flip(1).flatten()
    rates = _rates(config, rows, g)
    frequency = config.topic_shares() @ rates
    frequency[rows["child"]] = config.child_rate * frequency[parent[rows["child"]]]
    frequency[rows["tied"]] = frequency[parent[rows["tied"]]]
    first, second = rows["divided"][::2], rows["divided"][1::2]
    of_first = _dealt(config.divided_shares, len(first))
    frequency[first], frequency[second] = of_first * frequency[first], (1 - of_first) * frequency[first]
    common = unit_vectors(1, config.d_model, g)
    bias = normalize(common + 0.2 * unit_vectors(2, config.d_model, g), dim=1) * config.mean_length * config.signal()
    sizes = 1 / (torch.arange(config.n_noise) + 1.0).sqrt()
    noise = unit_vectors(config.n_noise, config.d_model, g) * (sizes / sizes.norm())[:, None]
    norms = vectors.norm(dim=2)
    table = pandas.DataFrame(
        {
            "class": np.where(np.isin(kinds, TUNED_ONLY), "tuned-only", kinds),
            "kind": kinds,
            "gain": (norms[:, 0] / norms[:, 1]).double().numpy().round(6),
            "cosine": cosine_similarity(vectors[:, 0], vectors[:, 1], dim=1).numpy(),
            "frequency": frequency.numpy(),
            "parent": parent.numpy(),
            "other": other.numpy(),
        }
    )
    table.index.name = "feature"
    return World(config, table, vectors, bias, rates, noise * config.shared_noise * config.signal())


def _vectors(config: UnkindConfig, rows: dict[str, Tensor], g: torch.Generator) -> Float[Tensor, "features 2 d_model"]:
    n = sum(len(of_kind) for of_kind in rows.values())
    vectors = unit_vectors(n, config.d_model, g)[:, None].repeat(1, 2, 1)
    base, tuned = vectors.unbind(dim=1)
    for kind in TUNED_ONLY:
        base[rows[kind]] = 0
    tuned[rows["base-only"]] = 0
    base[rows["rotated"]] = unit_vectors(config.n_rotated, config.d_model, g)
    base[rows["rescaled"]] *= _dealt(config.gains, config.n_rescaled)[:, None]
    base[rows["divided"][1::2]] = base[rows["divided"][::2]]
    along = base[rows["divided"]]
    across = unit_vectors(config.n_divided, config.d_model, g)
    across = normalize(across - (across * along).sum(dim=1, keepdim=True) * along, dim=1)
    cosine = _dealt(config.divided_cosines, config.n_divided // 2).repeat_interleave(2)[:, None]
    tuned[rows["divided"]] = cosine * along + (1 - cosine**2).sqrt() * across
    return vectors


def _dealt(values: tuple[float, ...], n: int) -> Float[Tensor, " n"]:
    return torch.tensor(values).repeat(n)[:n]


def _rates(config: UnkindConfig, rows: dict[str, Tensor], g: torch.Generator) -> Float[Tensor, "topics features"]:
    n = sum(len(of_kind) for of_kind in rows.values())
    twos = torch.cat([rows["pair"], rows["divided"]])
    frequency = 1 / (torch.randperm(n, generator=g) + FREQUENCY_OFFSET + 1.0)
    frequency[rows["divided"]] *= 2  # two features share their concept's tokens
    home = torch.randint(config.n_topics, (n,), generator=g)
    at_home = torch.rand(n, generator=g) >= HOMELESS
    for values in (frequency, home, at_home):
        values[twos[1::2]] = values[twos[::2]]
    frequency *= config.l0 / frequency.sum()
    lift = torch.ones(config.n_topics, n)
    lift[home[at_home], torch.arange(n)[at_home]] = config.topic_lift
    lift /= config.topic_shares() @ lift
    return (frequency * lift).clamp_max(0.95)


def sample(world: World, n_tokens: int, seed: int, *, chunk: int = 10_000) -> Sample:
    """Draw tokens; `chunk` of them at a time, so that no temporary is larger than the result."""
    g = torch.Generator().manual_seed(seed)
    config, table = world.config, world.table
    rows = {kind: torch.from_numpy(np.flatnonzero(table["kind"] == kind)) for kind in KINDS}
    parent = torch.tensor(table["parent"].to_numpy())
    first, second = rows["divided"][::2], rows["divided"][1::2]
    of_first = _dealt(config.divided_shares, len(first))
    x, activations = [], []
    for start in range(0, n_tokens, chunk):
        n = min(chunk, n_tokens - start)
        topic = torch.multinomial(config.topic_shares(), n, replacement=True, generator=g)
        fires = torch.rand(n, len(table), generator=g) < world.rates[topic]
        fires[:, rows["pair"][1::2]] = fires[:, rows["pair"][::2]]
        fires[:, rows["tied"]] = fires[:, parent[rows["tied"]]]
        under = torch.rand(n, len(rows["child"]), generator=g) < config.child_rate
        fires[:, rows["child"]] = under & fires[:, parent[rows["child"]]]
        concept, coin = fires[:, first], torch.rand(n, len(first), generator=g) < of_first
        fires[:, first], fires[:, second] = concept & coin, concept & ~coin
        magnitude = (2 * torch.rand(fires.shape, generator=g).clamp_min(1e-7)) ** (-1 / config.tail)
        s = fires * magnitude
        both = torch.randn(n, 1, config.n_noise, generator=g) @ world.noise
        clean = (s @ world.vectors.flatten(1)).unflatten(1, (2, -1)) + world.bias + both
        clean += config.noise * torch.randn(clean.shape, generator=g)
        outlier = torch.rand(n, generator=g) < config.outlier_share
        x.append(clean * torch.where(outlier, config.outlier_length, 1.0)[:, None, None])
        activations.append(s)
    return Sample(torch.cat(x), torch.cat(activations))
