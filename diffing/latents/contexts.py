r"""Where latents fire: shares of activation by kind of context, and the strongest examples.

A token's context is `template` where it belongs to the chat template, otherwise the group of its document, or `other`
where there are more groups than `MAX_GROUPS` and this is none of the largest. The share of
latent j in context c is sum_{n in c} f_nj / sum_n f_nj: activation mass, not counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.scored import Tokens
from crosscoders.dictionary import selection
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.text.decoding import MAX_BYTES, token_texts
from crosscoders.text.documents import RESERVED_GROUP
from crosscoders.text.tokens import ROLES

TEMPLATE = RESERVED_GROUP
OTHER = "other"
MAX_GROUPS = 12
"""Groups of documents with a context of their own: a column each, and a sum for each latent."""
WINDOW = (16, 8)
"""Tokens of an example before its peak, and from the peak on."""


Encode = Callable[[Float[Tensor, "batch n_models d_model"]], Float[Tensor, "batch chosen"]]
"""Activations in the units of x -> a few latents, on the CPU."""


class ContextSums:
    """Activation mass of each latent in each context, float64.

    groups: names, by number. n_tokens: of each group; the `MAX_GROUPS` with most keep their name where there are more,
    and the others are `OTHER`.
    """

    def __init__(self, dict_size: int, groups: list[str], n_tokens: Sequence[int] = ()) -> None:
        self.n_folded = n_folded(groups)
        named = list(range(len(groups)))
        if self.n_folded:
            candidates = (number for number in named if groups[number] != OTHER)
            named = sorted(sorted(candidates, key=lambda number: -n_tokens[number])[:MAX_GROUPS])
        self.names = [groups[number] for number in named] + ([OTHER] if self.n_folded else []) + [TEMPLATE]
        self.context = torch.full((len(groups),), len(named))  # of each group; OTHER where it has none of its own
        self.context[named] = torch.arange(len(named))
        self.mass = torch.zeros(dict_size, len(self.names), dtype=torch.float64)

    def add(self, latents: selection.Active, tokens: Tokens) -> None:
        """Add the active latents of one batch of tokens."""
        contexts = torch.where(
            tokens.roles == ROLES.index(TEMPLATE), len(self.names) - 1, self.context[tokens.groups.long()]
        )
        index = latents.latents.cpu() * len(self.names) + contexts[latents.tokens.cpu()]
        self.mass += torch.bincount(index, weights=latents.values.double().cpu(), minlength=self.mass.numel()).view_as(
            self.mass
        )

    def shares(self) -> Float[Tensor, "dict_size n_contexts"]:
        """Return the share of each context in each latent's activation; 0 for a latent that never fires."""
        return self.mass / self.mass.sum(dim=1, keepdim=True).clamp_min(1e-300)


def n_folded(groups: list[str]) -> int:
    """Return how many groups of documents have no context of their own."""
    return max(0, len(groups) - MAX_GROUPS)


def group_tokens(cache: ActivationCache, n_tokens: int) -> list[int]:
    """Return the tokens of each group among the first of a cache; empty where no group has to be folded."""
    groups = cache.manifest["groups"]
    if not n_folded(groups):
        return []
    counts = torch.zeros(len(groups), dtype=torch.int64)
    for tokens in cache.batches(1 << 20, 0, n_tokens):
        counts += torch.bincount(tokens.groups.long(), minlength=len(groups))
    return [int(count) for count in counts]


def examples(
    crosscoder: Crosscoder,
    cache: ActivationCache,
    latents: list[int],
    tokenizer: Any,
    *,
    n_examples: int = 20,
    n_tokens: int | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the documents in which each latent is strongest, one example per document, with the tokens around the
    peak; from the first `n_tokens` of the cache (default: all).

    Each example: document, group, position (of the peak in its document), value, tokens, values (one per token), peak
    (index into tokens). Tokens that are not cached, such as the beginning of sequence, are not shown.
    """
    return strongest_examples(
        ChosenLatents(crosscoder, latents).encode, cache, latents, tokenizer, n_examples=n_examples, n_tokens=n_tokens,
        observe=observe,
    )  # fmt: skip


def strongest_examples(
    encode: Encode,
    cache: ActivationCache,
    latents: list[int],
    tokenizer: Any,
    *,
    n_examples: int,
    n_tokens: int | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what `examples` returns, for latents that `encode` gives in the order of `latents`; `observe` gets each
    batch of them."""
    best = _Best(len(latents), 8 * n_examples)
    start = 0
    for tokens in cache.batches(4096, 0, n_tokens):
        activations = encode(tokens.activations)
        best.add(activations, tokens.document_ids, start)
        if observe is not None:
            observe(activations)
        start += len(tokens.token_ids)
    peaks = [(token, i) for i in range(len(latents)) for token in best.peaks(i, n_examples)]
    by_latent: dict[str, list[dict[str, Any]]] = {str(latent): [] for latent in latents}
    for token, i in sorted(peaks):  # in cache order, so that each shard is read once
        by_latent[str(latents[i])].append(_example(encode, cache, i, token, tokenizer))
    return {latent: sorted(rows, key=lambda row: -row["value"]) for latent, rows in by_latent.items()}


class ChosenLatents:
    """Encoder of a few latents only; far cheaper than all of them."""

    def __init__(self, crosscoder: Crosscoder, latents: list[int]) -> None:
        columns = torch.tensor(latents, dtype=torch.int64, device=crosscoder.b_enc.device)
        self.crosscoder = crosscoder
        self.weight = crosscoder.W_enc.detach().flatten(0, 1)[:, columns]
        self.bias = crosscoder.b_enc.detach()[columns]
        self.gate_at = crosscoder.gate_at().detach()[columns]

    def encode(self, x: Float[Tensor, "batch n_models d_model"]) -> Float[Tensor, "batch chosen"]:
        """Return the latents with the inference gate, as `Crosscoder.encode` gives them."""
        normalised = self.crosscoder.normalise(x.to(self.bias.device).float())
        pre = torch.addmm(self.bias, normalised.flatten(1), self.weight)
        return (pre * (pre > self.gate_at)).cpu()


class _Best:
    """The strongest tokens of each chosen latent, kept while batches go by."""

    def __init__(self, n_latents: int, n_kept: int) -> None:
        self.values = torch.zeros(n_latents, n_kept)
        self.locations = torch.full((2, n_latents, n_kept), -1)  # token and document

    def add(self, latents: Float[Tensor, "batch chosen"], documents: Int[Tensor, " batch"], start: int) -> None:
        tokens = torch.arange(start, start + len(latents))
        locations = torch.stack([tokens, documents.long()])[:, None].expand(-1, latents.shape[1], -1)
        values, locations = torch.cat([self.values, latents.T], dim=1), torch.cat([self.locations, locations], dim=2)
        self.values, order = values.topk(self.values.shape[1], dim=1)
        self.locations = locations.gather(2, order.expand(2, -1, -1))

    def peaks(self, i: int, n: int) -> list[int]:
        """Return the tokens of the n strongest documents of the i-th latent."""
        by_document: dict[int, int] = {}
        for value, token, document in zip(self.values[i].tolist(), *self.locations[:, i].tolist(), strict=True):
            if value > 0:
                by_document.setdefault(document, token)
        return list(by_document.values())[:n]


def _example(encode: Encode, cache: ActivationCache, i: int, token: int, tokenizer: Any) -> dict[str, Any]:
    first = max(0, token - WINDOW[0] - MAX_BYTES)
    tokens = cache.read(first, min(len(cache), token + WINDOW[1] + MAX_BYTES))
    inside = (tokens.document_ids == tokens.document_ids[token - first]).nonzero().squeeze(1)
    tokens = tokens.slice(int(inside[0]), int(inside[-1]) + 1)
    peak = token - first - int(inside[0])
    texts = token_texts(tokenizer, tokens.token_ids.tolist())
    start, stop = max(0, peak - WINDOW[0]), min(len(texts), peak + WINDOW[1])
    while start and not texts[start]:  # a character is shown whole
        start -= 1
    tokens, texts, peak = tokens.slice(start, stop), texts[start:stop], peak - start
    values = encode(tokens.activations)[:, i]
    return {
        "document": int(tokens.document_ids[peak]),
        "group": cache.manifest["groups"][int(tokens.groups[peak])],
        "position": int(tokens.positions[peak]),
        "value": round(float(values[peak]), 4),
        "peak": peak,
        "tokens": texts,
        "values": [round(float(v), 4) for v in values],
    }
