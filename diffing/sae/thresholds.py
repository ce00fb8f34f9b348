r"""Orders of latents, and what a null says of them.

    change        |change|, up and down               n_latents first of them
    attribution   first-order KL closed, largest first
    kl            KL closed alone, of the latents that were patched
    twin          1 - cosine of what the latent writes in both twins, where there are twins

For each order, the threshold is the value of its n-th latent: how many latents of the null reach it; and how many of
the pair's lie above the null's largest. The null has its own orders and its own patched latents.
"""

from typing import Any

import numpy as np
import pandas
from jaxtyping import Float

from crosscoders.common.results import row

COLUMNS = {"change": "change", "attribution": "attribution", "kl": "kl_closed", "twin": "twin_turn"}
"""Order -> the column that it sorts by."""
UNITS = {"change": "units of x", "twin": "1 - cosine"}


def strength(table: pandas.DataFrame, order: str) -> Float[np.ndarray, " dict_size"]:
    """Return what an order sorts by, largest first; -inf for latents that have no place in it."""
    values = table[COLUMNS[order]].to_numpy()
    return np.abs(values) if order == "change" else np.where(np.isfinite(values), values, -np.inf)


def first(table: pandas.DataFrame, order: str, n: int) -> list[int]:
    """Return the first latents of an order, at most n, none that is not positive."""
    values = strength(table, order)
    chosen = np.argsort(-values, kind="stable")[:n]
    return [int(latent) for latent in chosen if values[latent] > 0]


def orders_of(table: pandas.DataFrame) -> list[str]:
    """Return the orders that a table has the columns for."""
    return [order for order, column in COLUMNS.items() if column in table]


def with_ranks(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with rank_<order>, from 1, for every order; missing where a latent has no place."""
    for order in orders_of(table):
        values = pandas.Series(strength(table, order), index=table.index)
        ranks = values.where(np.isfinite(values)).rank(ascending=False, method="first")
        table[f"rank_{order}"] = ranks.astype("Int64")
    return table


def threshold_rows(table: pandas.DataFrame, null: pandas.DataFrame | None, n: int) -> list[dict[str, Any]]:
    """Return rows sae.<order>.{threshold,null_at_threshold,beyond_null}, and the same of the split within the base."""
    entries, size = [], len(table)
    for order in orders_of(table):
        chosen = first(table, order, n)
        if not chosen:
            continue
        values, unit = strength(table, order), UNITS.get(order, "nats/token")
        threshold = float(values[chosen[-1]])
        entries.append(row(f"sae.{order}.threshold", threshold, unit, len(chosen)))
        if order == "change":
            split = table["split_change"].abs().to_numpy()
            entries.append(row("sae.change.split_at_threshold", int((split >= threshold).sum()), "latents", size))
            entries.append(row("sae.change.beyond_split", int((values > split.max()).sum()), "latents", size))
        if null is not None and COLUMNS[order] in null:
            nulls = strength(null, order)
            entries.append(row(f"sae.{order}.null_largest", float(nulls.max()), unit, size))
            entries.append(row(f"sae.{order}.null_at_threshold", int((nulls >= threshold).sum()), "latents", size))
            entries.append(row(f"sae.{order}.beyond_null", int((values > nulls.max()).sum()), "latents", size))
    return entries
