r"""Which latents cause the difference: exchange them at the hook point and see how far the predictions follow.

For each direction, source s into target t, the target's upper layers run on a patched activation (causal_sets), and

    KL(set)       = mean over response tokens of KL(p_t || p_patched), nats/token
    CE(set)       = mean over response tokens of -log p_patched(token), nats/token
    share closed  = 1 - KL(set) / KL(none)

over all response tokens and over the first K of each response. The prediction of a token is made one position before
it. Tokens that are not scored (the beginning of sequence) keep the target's own activation. `measure` runs the models;
causal.summary divides and resamples.
Source: Minder et al. 2025 (arXiv 2504.02922), section on causality. Differs: docs/math.md, "Causal patching".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.common.checks import LEAST_CHATS
from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress, say
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import predictions
from crosscoders.models.limits import require_ids
from crosscoders.models.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.models.resume import ResumableModel, State
from crosscoders.text.chats import Chat, ChatBatch, batches, read_chats
from crosscoders.text.padding import padding_id
from crosscoders.text.settings import DataConfig
from diffing.causal.sets import Exchange, Exchanger, PatchSet

DIRECTIONS = {"base_to_tuned": 1, "tuned_to_base": 0}
"""Direction -> the target, whose upper layers run."""
_LOGITS = 1 << 25
"""Entries of one tensor of logits: 128 MiB in float32."""


class Measured(NamedTuple):
    """Sums over the response tokens of each document, one direction."""

    names: list[str]
    """One per patch; draws of one random set share a name. `source_model` is the other model, unpatched."""
    kl: Float[np.ndarray, "windows patches documents"]
    """Window 0: all response tokens; window 1: the first K of each response."""
    ce: Float[np.ndarray, "windows patches documents"]
    own_ce: Float[np.ndarray, "windows documents"]
    """CE of the target itself."""
    n_tokens: Int[np.ndarray, "windows documents"]


def inspect_cached(cache: ActivationCache) -> PairInfo:
    """Check the pair that a cache was made with, without its weights."""
    config = cache.config
    return inspect_pair(config.base, config.tuned, [cache.manifest["hook_point"]], tokenizer=config.tokenizer)


def read_enough_chats(config: DataConfig, info: PairInfo, n_documents: int, too_few: str) -> list[Chat]:
    """Return at most `n_documents` chats with a response, that intervals can be made over.

    Raises:
        InputError: fewer than LEAST_CHATS, with `too_few` as what follows; ids that a model does not have.
    """
    chats = read_chats(config, info.tokenizer, n_documents)
    if len(chats) < LEAST_CHATS:
        raise InputError(f"{config.paths()} has {len(chats)} chats with a response; {too_few}")
    require_ids(np.concatenate([chat.ids for chat in chats]), info.n_ids, info.tokenizer, info.base)
    return chats


def load_whole(info: PairInfo, hook_point: str, device: str, dtype: str) -> ModelPair:
    """Load both models with their unembedding."""
    return load_pair(info.base, info.tuned, hook_point, device=device, dtype=dtype, info=info, whole=True)


def measure(
    exchanged: Crosscoder | Exchanger,
    pair: ModelPair,
    chats: list[Chat],
    sets: Mapping[str, list[PatchSet]],
    *,
    batch_rows: int = 8,
    first_tokens: int = 9,
) -> dict[str, Measured]:
    """Run every set of every direction over `chats`; `pair` holds whole models (`load_pair(..., whole=True)`).

    exchanged: a crosscoder of two models, or what builds patched activations in another way.

    Raises:
        InputError: a direction that does not exist, activations of another width than the crosscoder's, no chats.
    """
    unknown = [name for name in sets if name not in DIRECTIONS]
    if unknown or not sets or not chats:
        raise InputError(f"measure needs chats and sets for {' or '.join(DIRECTIONS)}; it got {unknown or 'none'}.")
    models = [ResumableModel(model, pair.hook_points[0]) for model in pair.models]
    if not all(model.prefix for model in models):
        say("the layers below the hook point cannot be left out in this architecture; every patch runs them")
    exchange = Exchange(exchanged.to(pair.device)) if isinstance(exchanged, Crosscoder) else exchanged
    sums = {name: _Sums([p.name for p in listed], len(chats), first_tokens) for name, listed in sets.items()}
    progress = Progress("causal", total=len(chats), unit="chat")
    for batch in batches(chats, batch_rows, padding_id(pair.info.tokenizer, pair.info.n_ids)):
        tokens = batch.tokens.to(pair.device)
        states = [model.run(tokens) for model in models]
        x = torch.stack([state.activation[tokens.scored] for state in states], dim=1)
        parts = exchange.take_apart(x, batch.is_template[batch.tokens.scored])
        for name, patches in sets.items():
            _one_direction(sums[name], models, states, batch, exchange, parts, patches, DIRECTIONS[name])
        progress.update(len(batch.place))
    progress.close()
    return {name: total.result() for name, total in sums.items()}


def _one_direction(
    sums: "_Sums",
    models: list[ResumableModel],
    states: list[State],
    batch: ChatBatch,
    exchange: Exchanger,
    parts: Any,
    patches: list[PatchSet],
    target: int,
) -> None:
    """Add one batch: the residuals of all patches at the predicting positions, then logits in chunks."""
    model, state, other = models[target], states[target], states[1 - target]
    scored = state.batch.scored
    predicted = batch.place[:, 1:] > 0
    at = predicted.to(model.device)
    finals = []
    for patch in patches:
        activation = state.activation.clone()
        activation[scored] = exchange.patched(parts, patch, target).to(activation.dtype)
        finals.append(model.resume(state, activation)[:, :-1][at])
    own, source = state.final[:, :-1][at], other.final[:, :-1][at]
    token_ids, place = batch.tokens.ids[:, 1:][predicted], batch.place[:, 1:][predicted]
    documents = torch.from_numpy(batch.tokens.numbers)[:, None].expand(predicted.shape)[predicted]
    vocabulary = model.logits(own[:1]).shape[1]
    for span in torch.arange(len(own)).split(max(1, _LOGITS // vocabulary)):
        tokens = token_ids[span].to(model.device)
        log_p = predictions.log_probs(model.logits(own[span]))
        sums.add_own(documents[span], place[span], predictions.ce(log_p, tokens))
        changed = [(model, final) for final in finals] + [(models[1 - target], source)]
        for i, (reader, final) in enumerate(changed):
            log_q = predictions.log_probs(reader.logits(final[span]))
            sums.add(i, documents[span], place[span], predictions.kl(log_p, log_q), predictions.ce(log_q, tokens))


class _Sums:
    """Sums in float64 by window, patch and document."""

    def __init__(self, names: list[str], n_documents: int, first_tokens: int) -> None:
        self.names, self.first_tokens = [*names, "source_model"], first_tokens
        self.kl = torch.zeros(2, len(self.names), n_documents, dtype=torch.float64)
        self.ce = torch.zeros_like(self.kl)
        self.own_ce = torch.zeros(2, n_documents, dtype=torch.float64)
        self.n_tokens = torch.zeros(2, n_documents, dtype=torch.int64)

    def _windows(self, place: Int[Tensor, " tokens"]) -> list[Tensor]:
        return [place > 0, place <= self.first_tokens]

    def add_own(
        self, documents: Int[Tensor, " tokens"], place: Int[Tensor, " tokens"], ce: Float[Tensor, " tokens"]
    ) -> None:
        for window, inside in enumerate(self._windows(place)):
            self.own_ce[window].index_add_(0, documents, ce.double().cpu() * inside)
            self.n_tokens[window].index_add_(0, documents, inside.long())

    def add(
        self,
        patch: int,
        documents: Int[Tensor, " tokens"],
        place: Int[Tensor, " tokens"],
        kl: Float[Tensor, " tokens"],
        ce: Float[Tensor, " tokens"],
    ) -> None:
        for window, inside in enumerate(self._windows(place)):
            self.kl[window, patch].index_add_(0, documents, kl.double().cpu() * inside)
            self.ce[window, patch].index_add_(0, documents, ce.double().cpu() * inside)

    def result(self) -> Measured:
        return Measured(self.names, self.kl.numpy(), self.ce.numpy(), self.own_ce.numpy(), self.n_tokens.numpy())
