"""Massive activations of a shard: how much of the variance a few tokens hold, and leaving them out.

A shard is judged by itself, its median norm and its mean, so that parts, merged caches and runs that go on give the
same numbers as one run. Definitions in docs/math.md, "Outlying tokens".
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.activations.scored import Tokens
from crosscoders.common.errors import InputError

TOP = 0.001
"""Share of the tokens that count as the largest."""
MULTIPLE = 5.0
"""Of the median norm, from which a token is outlying. Gemma-3-270M in its middle: at most 1.5 for ordinary tokens, 13.8
for BOS."""
HIGH_SHARE = 0.2
"""Share of the variance in outlying tokens from which it is said: a dictionary of nothing else has an FVE of that."""
SUMS = ("norm_median_sum", "spread", "top_tokens", "top_spread", "outlying_tokens", "outlying_spread")


def beyond(norms: Float[Tensor, "tokens n_models"], multiple: float) -> Bool[Tensor, "tokens n_models"]:
    """Return which tokens of a shard have a norm of more than `multiple` times its median norm, per model."""
    return norms > multiple * norms.median(dim=0).values


def within(tokens: Tokens, max_norm_multiple: float | None) -> Tokens:
    """Return a shard without the tokens that are `beyond` in any model; None leaves all of them.

    Raises:
        InputError: none is left.
    """
    if max_norm_multiple is None:
        return tokens
    norms = torch.linalg.vector_norm(tokens.activations, dim=-1, dtype=torch.float64)
    is_within = ~beyond(norms, max_norm_multiple).any(dim=1)
    if not is_within.any():
        raise InputError(f"max_norm_multiple = {max_norm_multiple} leaves no token of a shard. Raise it.")
    return tokens if is_within.all() else Tokens(*(column[is_within] for column in tokens))


def outlier_sums(
    x: Float[Tensor, "tokens n_models d_model"],
    norms: Float[Tensor, "tokens n_models"],
    mean: Float[Tensor, "n_models d_model"],
) -> dict[str, list[float]]:
    """Return the `SUMS` of a shard, a number per model each: spreads are sums of ||x - mean x||^2 over its tokens."""
    largest = torch.zeros_like(norms, dtype=torch.bool)
    n_largest = -int(-TOP * len(norms) // 1)
    largest.scatter_(0, norms.topk(n_largest, dim=0).indices, True)
    outlying = beyond(norms, MULTIPLE)
    # Squared distances of these few alone: of all tokens, their sum is enough.
    few = (largest | outlying).any(dim=1)
    squares = (x[few].double() - mean).square().sum(dim=-1)
    spread = (norms.square().sum(dim=0) - len(norms) * mean.square().sum(dim=1)).clamp_min(0)
    sums = (
        norms.median(dim=0).values * len(norms), spread, largest.sum(dim=0), (squares * largest[few]).sum(dim=0),
        outlying.sum(dim=0), (squares * outlying[few]).sum(dim=0),
    )  # fmt: skip
    return {name: values.tolist() for name, values in zip(SUMS, sums, strict=True)}


def outlier_statistics(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the statistics of a cache from the sums of its shards; empty where one is of a version without them."""
    if any(name not in shard for shard in shards for name in SUMS):
        return {}
    total = {name: np.sum([shard[name] for shard in shards], axis=0) for name in SUMS}
    spread = np.where(total["spread"] > 0, total["spread"], 1.0)
    return {
        "median_norm": (total["norm_median_sum"] / sum(shard["n_tokens"] for shard in shards)).tolist(),
        "top_tokens": total["top_tokens"].tolist(),
        "top_share": (total["top_spread"] / spread).tolist(),
        "outlying_tokens": total["outlying_tokens"].tolist(),
        "outlying_share": (total["outlying_spread"] / spread).tolist(),
    }


def outlier_text(statistics: dict[str, Any]) -> str:
    """Return the shares of a manifest's statistics in words, with what to do where they are high; empty where the
    manifest is of a version without them."""
    if "top_share" not in statistics:
        return ""
    top, outlying = statistics["top_share"], statistics["outlying_share"]
    words = (
        f"share of the variance, base and tuned: {top[0]:.1%} and {top[1]:.1%} in the {TOP:.1%} of tokens of largest "
        f"norm, {outlying[0]:.1%} and {outlying[1]:.1%} in {max(statistics['outlying_tokens']):,} tokens beyond "
        f"{MULTIPLE:g} times the median norm"
    )
    if max(*top, *outlying) <= HIGH_SHARE:
        return words
    return (
        f"warning: {words}. A dictionary that learns only these looks good. Leave them out: --skip-first 1 where they "
        f"are first positions, else --max-norm-multiple {MULTIPLE:g}."
    )
