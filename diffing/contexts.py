r"""Where latents fire: shares of activation by kind of context, and the strongest examples.

A token's context is `template` where it belongs to the chat template, otherwise the group of its document. The share of
latent j in context c is sum_{n in c} f_nj / sum_n f_nj: activation mass, not counts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders import sparse
from crosscoders.cache import ActivationCache, Tokens
from crosscoders.model import Crosscoder
from crosscoders.tokens import ROLES

TEMPLATE = "template"


class ContextSums:
    """Activation mass of each latent in each context, float64."""

    def __init__(self, dict_size: int, groups: list[str]) -> None:
        self.names = [*groups, TEMPLATE]
        self.mass = torch.zeros(dict_size, len(self.names), dtype=torch.float64)

    def add(self, latents: sparse.Active, tokens: Tokens) -> None:
        """Add the active latents of one batch of tokens."""
        contexts = torch.where(tokens.roles == ROLES.index(TEMPLATE), len(self.names) - 1, tokens.groups.long())
        index = latents.latents.cpu() * len(self.names) + contexts[latents.tokens.cpu()]
        self.mass += torch.bincount(index, weights=latents.values.double().cpu(), minlength=self.mass.numel()).view_as(
            self.mass
        )

    def shares(self) -> Float[Tensor, "dict_size n_contexts"]:
        """Share of each context in each latent's activation; 0 for a latent that never fires."""
        return self.mass / self.mass.sum(dim=1, keepdim=True).clamp_min(1e-300)


@torch.no_grad()
def examples(
    crosscoder: Crosscoder,
    cache: ActivationCache,
    latents: list[int],
    tokenizer: Any,
    *,
    n_examples: int = 8,
    window: int = 16,
) -> dict[str, list[dict[str, Any]]]:
    """The documents in which each latent is strongest, one example per document, with the tokens around the peak.

    Each example: document, group, position (of the peak in its document), value, tokens, values (one per token), peak
    (index into tokens). Tokens that are not cached, such as the beginning of sequence, are not shown.
    """
    columns = torch.tensor(latents)
    best = _Best(len(latents), 8 * n_examples)
    start = 0
    for tokens in cache.batches(4096):
        best.add(_encode(crosscoder, tokens, columns), start)
        start += len(tokens.token_ids)
    document_ids = cache.document_tokens()
    groups: list[str] = cache.manifest["groups"]
    found: dict[str, list[dict[str, Any]]] = {}
    for i, latent in enumerate(latents):
        rows: list[dict[str, Any]] = []
        for token in best.tokens_of(i):
            document = int(document_ids[token])
            if len(rows) < n_examples and all(row["document"] != document for row in rows):
                rows.append(_example(crosscoder, cache, document_ids, latent, token, tokenizer, groups, window))
        found[str(latent)] = rows
    return found


def _encode(crosscoder: Crosscoder, tokens: Tokens, columns: Int[Tensor, " chosen"]) -> Float[Tensor, "batch chosen"]:
    x = tokens.activations.to(crosscoder.b_enc.device).float()
    return crosscoder.encode(x)[:, columns.to(x.device)].cpu()


class _Best:
    """The strongest tokens of each chosen latent, kept while batches go by."""

    def __init__(self, n_latents: int, n_kept: int) -> None:
        self.values = torch.zeros(n_latents, n_kept)
        self.tokens = torch.full((n_latents, n_kept), -1)

    def add(self, latents: Float[Tensor, "batch chosen"], start: int) -> None:
        numbers = torch.arange(start, start + len(latents)).expand(latents.shape[1], -1)
        values, tokens = torch.cat([self.values, latents.T], dim=1), torch.cat([self.tokens, numbers], dim=1)
        self.values, chosen = values.topk(self.values.shape[1], dim=1)
        self.tokens = tokens.gather(1, chosen)

    def tokens_of(self, i: int) -> Iterable[int]:
        return [int(t) for t, value in zip(self.tokens[i], self.values[i], strict=True) if value > 0]


def _example(
    crosscoder: Crosscoder,
    cache: ActivationCache,
    document_ids: Int[Tensor, " tokens"],
    latent: int,
    token: int,
    tokenizer: Any,
    groups: list[str],
    window: int,
) -> dict[str, Any]:
    start, stop = token, token + 1
    while start > max(0, token - window) and document_ids[start - 1] == document_ids[token]:
        start -= 1
    while stop < min(len(document_ids), token + window // 2) and document_ids[stop] == document_ids[token]:
        stop += 1
    tokens = cache.read(start, stop)
    values = _encode(crosscoder, tokens, torch.tensor([latent]))[:, 0]
    return {
        "document": int(document_ids[token]),
        "group": groups[int(tokens.groups[0])],
        "position": int(tokens.positions[token - start]),
        "value": round(float(values[token - start]), 4),
        "peak": token - start,
        "tokens": [tokenizer.decode([int(t)]) for t in tokens.token_ids],
        "values": [round(float(v), 4) for v in values],
    }
