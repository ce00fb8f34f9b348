r"""How often and how strongly each latent fires in base and tuned model, on the same tokens.

    rate_m    = share of tokens with f_j > 0 in model m          mean_m = mean of f_j over all tokens
    change    = (mean_tuned - mean_base) ||d_j||, d_j what the latent writes: comparable between latents, units of x
    reply_rate_m, reply_max_m = the same for the largest f_j of each reply, a run of response tokens

Differences are paired, and their errors are over documents (`clusters`). split_change is the same change within the
base model, between two random halves of the documents: what an unpaired comparison gives without any tuning.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.scored import Tokens, concatenate
from crosscoders.common.progress import Progress
from crosscoders.dictionary import selection
from crosscoders.dictionary.metrics import ReconstructionSums
from crosscoders.text.tokens import ROLES
from diffing.latents.contexts import ContextSums, group_tokens
from diffing.sae.clusters import DocumentSums
from diffing.sae.dictionaries import directions, token_chunk
from sae_lora.dictionaries.frozen import FrozenDictionary, is_transcoder

MODELS = ("base", "tuned")
QUANTITIES = ("rate", "mean", "reply_rate", "reply_max")
_RESPONSE = ROLES.index("assistant")


class Rates(NamedTuple):
    """One dictionary on the activations of both models."""

    table: pandas.DataFrame
    """A row for each latent."""
    fve: list[float | None]
    """Fraction of variance explained, per model; None for a transcoder, which rebuilds something else."""
    l0: list[float]
    """Mean active latents per token, per model."""
    n_tokens: int
    n_documents: int
    n_replies: int


def whole_documents(cache: ActivationCache, n_tokens: int) -> Iterator[Tokens]:
    """Yield the tokens of a cache in batches of about n_tokens that never cut a document."""
    held: Tokens | None = None
    for tokens in cache.batches(n_tokens):
        tokens = tokens if held is None else concatenate([held, tokens])
        done = int((tokens.document_ids == tokens.document_ids[-1]).nonzero()[0])
        if done:
            yield tokens.slice(0, done)
        held = tokens.slice(done, len(tokens.token_ids))
    if held is not None:
        yield held


def reply_runs(tokens: Tokens) -> list[tuple[int, int]]:
    """Return start and stop of every run of response tokens of one document."""
    inside = (tokens.roles == _RESPONSE).numpy()
    documents = tokens.document_ids.numpy()
    begins = inside & ~(np.r_[False, inside[:-1]] & np.r_[False, documents[1:] == documents[:-1]])
    starts, n = np.flatnonzero(begins), len(inside)
    stops = [start + int(np.argmin(np.r_[inside[start:], False])) for start in starts]
    borders = np.r_[starts[1:], n] if len(starts) else starts
    return [(int(a), int(min(b, border))) for a, b, border in zip(starts, stops, borders, strict=True)]


class _Sums:
    """What one pass over the documents adds up."""

    def __init__(self, dictionary: FrozenDictionary, cache: ActivationCache, seed: int) -> None:
        size = dictionary.info.dict_size
        self.paired = {(q, side): DocumentSums(size) for q in QUANTITIES for side in (*MODELS, "change")}
        self.quality = [ReconstructionSums(1, dictionary.info.d_model, size) for _ in MODELS]
        groups = cache.manifest["groups"]
        self.contexts = [ContextSums(size, groups, group_tokens(cache, len(cache))) for _ in MODELS]
        self.halves = [DocumentSums(size) for _ in range(2)]
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, dictionary: FrozenDictionary, tokens: Tokens) -> None:
        """Add whole documents."""
        inverse, counts = torch.unique_consecutive(tokens.document_ids, return_inverse=True, return_counts=True)[1:]
        membership = torch.nn.functional.one_hot(inverse).T.float()
        runs = reply_runs(tokens)
        replies = torch.zeros(len(counts), len(runs))
        for number, (start, _) in enumerate(runs):
            replies[inverse[start], number] = 1.0
        of_model: list[dict[str, Tensor]] = []
        for model in range(2):
            f = self._encode(dictionary, tokens, model)
            largest = torch.stack([f[a:b].amax(dim=0) for a, b in runs]) if runs else f[:0]
            per = {"rate": (membership, (f > 0).float()), "mean": (membership, f)}
            per |= {"reply_rate": (replies, (largest > 0).float()), "reply_max": (replies, largest)}
            of_model.append({name: owners @ values for name, (owners, values) in per.items()})
        n_tokens, n_replies = counts.float(), replies.sum(dim=1)
        for name in QUANTITIES:
            n = n_replies if name.startswith("reply") else n_tokens
            base, tuned = of_model[0][name], of_model[1][name]
            for side, values in (("base", base), ("tuned", tuned), ("change", tuned - base)):
                self.paired[name, side].add(values, n)
        half = torch.randint(0, 2, (len(counts),), generator=self.generator)
        for number, sums in enumerate(self.halves):
            sums.add(of_model[0]["mean"][half == number], n_tokens[half == number])

    def _encode(self, dictionary: FrozenDictionary, tokens: Tokens, model: int) -> Float[Tensor, "tokens dict_size"]:
        device = next(iter(dictionary.state_dict().values())).device
        x = tokens.activations[:, model].to(device, dictionary.dtype)
        f, x_hat = dictionary.reconstruct(x)
        if not is_transcoder(dictionary.info):
            self.quality[model].add(x.float()[:, None], x_hat.float()[:, None], (f > 0).sum(dim=0))
        f = f.float().cpu()
        at, latents = (f > 0).nonzero(as_tuple=True)
        self.contexts[model].add(selection.Active(at, latents, f[at, latents], *f.shape), tokens)
        return f


@torch.no_grad()
def compare_rates(dictionary: FrozenDictionary, cache: ActivationCache, *, seed: int = 0) -> Rates:
    """Return rates, means and their paired changes of every latent, over all tokens of a cache of two models."""
    sums = _Sums(dictionary, cache, seed)
    progress = Progress("sae", total=len(cache), unit="tok")
    for tokens in whole_documents(cache, token_chunk(dictionary)):
        sums.add(dictionary, tokens)
        progress.update(len(tokens.token_ids))
    progress.close()
    norms = directions(dictionary).norm(dim=1).cpu()
    columns: dict[str, object] = {"decoder_norm": norms.numpy()}
    for name in QUANTITIES:
        for side in MODELS:
            columns[f"{name}_{side}"] = sums.paired[name, side].mean().numpy()
        columns[f"{name}_change"] = sums.paired[name, "change"].mean().numpy()
        columns[f"{name}_change_stderr"] = sums.paired[name, "change"].stderr().numpy()
    change = sums.paired["mean", "change"].mean() * norms
    columns["change"] = change.numpy()
    columns["split_change"] = ((sums.halves[1].mean() - sums.halves[0].mean()) * norms).numpy()
    columns["main_context"], columns["main_context_share"] = _main_contexts(sums.contexts, change)
    table = pandas.DataFrame(columns)
    table.index.name = "latent"
    fve = [None if is_transcoder(dictionary.info) else quality.result().fve[0] for quality in sums.quality]
    return Rates(
        table,
        fve,
        [float(sums.paired["rate", side].mean().sum()) for side in MODELS],
        int(sums.paired["rate", "change"].n),
        sums.paired["rate", "change"].n_documents,
        int(sums.paired["reply_rate", "change"].n),
    )


def _main_contexts(
    contexts: list[ContextSums], change: Float[Tensor, " dict_size"]
) -> tuple[list[str | None], Float[np.ndarray, " dict_size"]]:
    """Return where each latent fires most, in the model in which it is stronger, and the share of it."""
    shares = torch.where((change >= 0)[:, None], contexts[1].shares(), contexts[0].shares())
    largest = shares.max(dim=1)
    names = [contexts[0].names[i] if share > 0 else None for share, i in zip(*largest, strict=True)]
    return names, largest.values.numpy()


def in_both(
    dictionary: FrozenDictionary, x: Float[Tensor, "tokens 2 d_model"], latents: Int[Tensor, " chosen"]
) -> Float[Tensor, "tokens chosen"]:
    """Return the chosen latents, each as in the model in which it is stronger on that token."""
    device = next(iter(dictionary.state_dict().values())).device
    parts = []
    for chunk in x.split(token_chunk(dictionary)):
        f = [dictionary.encode(chunk[:, m].to(device, dictionary.dtype))[:, latents] for m in range(2)]
        parts.append(torch.maximum(f[0], f[1]).float().cpu())
    return torch.cat(parts)
