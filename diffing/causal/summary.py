r"""Rows and words of a causal measurement: means, shares of KL closed, bootstrap intervals over documents.

`causal_rows` gives the rows of `--json`, `causal_summary` a table for people. Nothing here runs a model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from crosscoders.common.checks import ENOUGH_CHATS, FEW_CHATS
from crosscoders.common.errors import InputError
from crosscoders.common.results import legend, row
from crosscoders.common.statistics import bootstrap_interval, resample
from diffing.causal.patching import DIRECTIONS, Measured
from diffing.causal.sets import BASELINES


class _Resampled:
    """Sums over documents: index 0 is the estimate, the others are bootstrap resamples of documents, and of the draws
    of a random set with them. All sets share the resamples, so that differences are paired."""

    def __init__(self, measured: Measured, window: int, seed: int) -> None:
        self.measured, self.window = measured, window
        self.generator = np.random.default_rng(seed)
        n = measured.n_tokens.shape[1]
        self.weights = resample(n, self.generator)
        self.tokens = self.weights @ measured.n_tokens[window]
        self.n_documents, self.n_tokens = n, int(measured.n_tokens[window].sum())

    def mean(self, sums: Float[np.ndarray, "patches documents"]) -> Float[np.ndarray, " resamples"]:
        """Return the mean over tokens, then over draws where there are several."""
        values = self.weights @ sums.T / self.tokens[:, None]
        draws = values.shape[1]
        if draws == 1:
            return values[:, 0]
        return (values * resample(draws, self.generator) / draws).sum(axis=1)

    def of(self, name: str, what: str) -> Float[np.ndarray, " resamples"]:
        """Return `kl` or `ce` of the set of this name."""
        picked = [i for i, known in enumerate(self.measured.names) if known == name]
        return self.mean(getattr(self.measured, what)[self.window][picked])

    def row(self, name: str, values: Float[np.ndarray, " resamples"], unit: str) -> dict[str, Any]:
        low, high = bootstrap_interval(values) if self.n_documents > 1 else (None, None)
        return row(name, float(values[0]), unit, self.n_tokens, low, high)


def causal_rows(measured: Mapping[str, Measured], *, first_tokens: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows causal.<direction>.<set>[.first_<K>].{kl,ce,share_closed} with 95% bootstrap intervals over
    documents.

    Raises:
        InputError: the two models predict the same, so that there is nothing to close.
    """
    entries = []
    for direction, sums in measured.items():
        entries.append(
            row(f"causal.{direction}.documents", sums.n_tokens.shape[1], "documents", sums.n_tokens.shape[1])
        )
        for window, suffix in enumerate(("", f".first_{first_tokens}")):
            entries += _window_rows(f"causal.{direction}", suffix, _Resampled(sums, window, seed))
    return entries


def _window_rows(start: str, suffix: str, resampled: _Resampled) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(resampled.measured.names))
    kl = {name: resampled.of(name, "kl") for name in names}
    if kl["none"][0] <= 0:
        raise InputError("the two models give the same activations at this hook point, so there is no KL to close.")
    share = {name: 1 - values / kl["none"] for name, values in kl.items()}
    own = resampled.mean(resampled.measured.own_ce[resampled.window][None])
    entries = [resampled.row(f"{start}.unpatched{suffix}.ce", own, "nats/token")]
    for name in names:
        entries.append(resampled.row(f"{start}.{name}{suffix}.kl", kl[name], "nats/token"))
        entries.append(resampled.row(f"{start}.{name}{suffix}.ce", resampled.of(name, "ce"), "nats/token"))
        if name not in ("none", "source_model"):
            entries.append(resampled.row(f"{start}.{name}{suffix}.share_closed", share[name], "fraction"))
    for top in dict.fromkeys(name.split(".")[0] for name in names if name.startswith("top_")):
        for other in BASELINES:
            gain = share[f"{top}.scaling"] - share[f"{top}.{other}"]
            entries.append(resampled.row(f"{start}.{top}.scaling_minus_{other}{suffix}.share_closed", gain, "fraction"))
        draws = [i for i, name in enumerate(resampled.measured.names) if name == f"{top}.random"]
        smallest = resampled.measured.kl[resampled.window][draws].sum(axis=1).min() / resampled.n_tokens
        largest = 1 - smallest / kl["none"][0]
        entries.append(
            row(f"{start}.{top}.random_largest{suffix}.share_closed", float(largest), "fraction", len(draws))
        )
    return entries


def causal_summary(rows: list[dict[str, Any]], first_tokens: int) -> str:
    """Return the rows as a table for people, one block for each direction."""
    values, first = {entry["name"]: entry for entry in rows}, f".first_{first_tokens}"
    lines = []
    header = (
        f"  {'patched in':<24}{'KL':>8}{'CE':>8}   {'share closed (95%)':<24}{f'first {first_tokens}: KL':>12}"
        "   share closed"
    )
    for direction in DIRECTIONS:
        start = f"causal.{direction}."
        if f"{start}none.kl" not in values:
            continue
        n, n_first = values[f"{start}none.kl"]["n"], values[f"{start}none{first}.kl"]["n"]
        lines += [
            "",
            f"{direction.replace('_', ' ')}: {n:,} response tokens of {values[f'{start}documents']['value']:,} chats, "
            f"{n_first:,} of them the first {first_tokens} of a response",
            header,
        ]
        if values[f"{start}documents"]["value"] < ENOUGH_CHATS:
            lines.insert(-1, f"  {FEW_CHATS}")
        names = [key[len(start) : -3] for key in values if key.startswith(start) and key.endswith(".kl")]
        lines += [_line(values, start + name, name, first) for name in names if not name.endswith(first)]
    return "\n".join([*lines, "", *legend(header, meanings_of(first_tokens))])


def meanings_of(first_tokens: int) -> dict[str, str]:
    """Return what each column of `causal_summary` is."""
    return {
        "patched in": "what the model patched gets of the other one",
        "KL": "of its predictions from the unpatched ones of the model that they should become, nats/token",
        "CE": "cross-entropy of the response, nats/token",
        "share closed (95%)": "of the KL at none, interval over chats",
        f"first {first_tokens}: KL": f"over the first {first_tokens} tokens of each response",
        "share closed": "of that",
    }


def _line(values: dict[str, dict[str, Any]], start: str, name: str, first: str) -> str:
    text = f"  {name:<24}{values[f'{start}.kl']['value']:>8.4f}{values[f'{start}.ce']['value']:>8.3f}   "
    share, first_share = values.get(f"{start}.share_closed"), values.get(f"{start}{first}.share_closed")
    shown = "" if share is None else f"{share['value']:.1%}"
    if share is not None and share["low"] is not None:
        shown += f" ({share['low']:.1%} to {share['high']:.1%})"
    text += f"{shown:<24}{values[f'{start}{first}.kl']['value']:>12.4f}   "
    return (text + ("" if first_share is None else f"{first_share['value']:.1%}")).rstrip()
