r"""Latents of one dictionary exchanged between two models, and how much of the KL each explains to first order.

x_s the base's activation, x_t the tuned's, f the latents of the same dictionary on each, d_j what latent j writes:

    patched(S)     = x_s + sum_{j in S} (f_j(x_t) - f_j(x_s)) d_j      into the tuned model's upper layers
    KL closed      = KL(p_t || p on x_s) - KL(p_t || p on patched)
    attribution_j  = - sum_n <g_n, d_j> (f_nj(x_t) - f_nj(x_s)) / predictions,    g = d KL / d x at x_s

KL is summed over predictions of response tokens, and attribution is KL closed to first order. `causal.patching` runs
the models and sums; here are only the exchange and the gradient.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress
from crosscoders.models import predictions
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import ResumableModel, State, head_alone
from crosscoders.text.chats import Chat, ChatBatch, batches
from crosscoders.text.padding import padding_id
from diffing.causal.sets import PatchSet
from diffing.sae.clusters import DocumentSums
from diffing.sae.dictionaries import directions, token_chunk
from sae_lora.dictionaries.frozen import FrozenDictionary

_LOGITS = 1 << 24
"""Entries of one tensor of logits that takes part in a gradient."""


class SharedParts(NamedTuple):
    """The scored tokens of one batch, as one dictionary sees them in both models."""

    x: Float[Tensor, "tokens 2 d_model"]
    x_hat: Float[Tensor, "tokens 2 d_model"]
    difference: Float[Tensor, "tokens chosen"]
    """Tuned latents minus base latents, of those that may be patched."""


class SharedExchange:
    """Builds patched activations of one dictionary that both models share; see `causal.sets.Exchange`."""

    def __init__(self, dictionary: FrozenDictionary, latents: list[int]) -> None:
        self.dictionary = dictionary
        self.device = next(iter(dictionary.state_dict().values())).device
        self.latents = torch.tensor(latents, dtype=torch.int64, device=self.device)
        self.column = {latent: column for column, latent in enumerate(latents)}
        self.directions = directions(dictionary)[self.latents]

    @torch.no_grad()
    def take_apart(
        self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]
    ) -> SharedParts:
        """Encode and reconstruct both models' activations."""
        x = x.to(self.device).float()
        differences, x_hats = [], []
        for chunk in x.split(token_chunk(self.dictionary)):
            of_model = [self.dictionary.reconstruct(chunk[:, m].to(self.dictionary.dtype)) for m in range(2)]
            differences.append((of_model[1][0][:, self.latents] - of_model[0][0][:, self.latents]).float())
            x_hats.append(torch.stack([x_hat.float() for _, x_hat in of_model], dim=1))
        return SharedParts(x, torch.cat(x_hats), torch.cat(differences))

    @torch.no_grad()
    def patched(self, parts: SharedParts, patch: PatchSet, target: int) -> Float[Tensor, "tokens d_model"]:
        """Return the activation that goes into model `target` (0 base, 1 tuned) in place of its own."""
        source, own, other = parts.x[:, 1 - target], parts.x_hat[:, target], parts.x_hat[:, 1 - target]
        if patch.kind == "none":
            return source
        if patch.kind == "all":
            return source + (own - other)
        if patch.kind == "reconstruction":
            return own
        assert patch.kind == "latents"
        columns = [self.column[latent] for latent in patch.latents]
        sign = 1.0 if target == 1 else -1.0
        return source + sign * parts.difference[:, columns] @ self.directions[columns]


class Attribution(NamedTuple):
    """First-order KL closed by each latent, nats per predicted response token."""

    values: Float[Tensor, " dict_size"]
    stderr: Float[Tensor, " dict_size"]
    """Over documents."""
    kl: float
    """What there is to close, nats/token."""
    n_tokens: int


def attribute(dictionary: FrozenDictionary, pair: ModelPair, chats: list[Chat], *, batch_rows: int = 8) -> Attribution:
    """Return the attribution of every latent over the responses of chats.

    Raises:
        InputError: the two models give the same predictions.
    """
    written, size = directions(dictionary), dictionary.info.dict_size
    models = [ResumableModel(model, pair.hook_points[0]) for model in pair.models]
    sums, kl = DocumentSums(size), 0.0
    progress = Progress("attribution", total=len(chats), unit="chat")
    for batch in batches(chats, batch_rows, padding_id(pair.info.tokenizer, pair.info.n_ids)):
        states = [model.run(batch.tokens.to(pair.device)) for model in models]
        gradient, total = gradient_of_kl(models[1], states[1], states[0].activation, batch)
        kl += total
        scored = batch.tokens.scored
        rows = scored.nonzero()[:, 0]
        x = torch.stack([state.activation[scored.to(pair.device)] for state in states], dim=1)
        values = torch.zeros(len(scored), size, dtype=torch.float64)
        for part in torch.arange(len(rows)).split(token_chunk(dictionary)):
            values.index_add_(0, rows[part], _products(dictionary, written, x[part], gradient[scored][part]))
        sums.add(values, (batch.place[:, 1:] > 0).sum(dim=1).float())
        progress.update(len(scored))
    progress.close()
    if kl <= 0:
        raise InputError("the two models predict the same on these chats, so there is no KL to attribute.")
    return Attribution(sums.mean(), sums.stderr(), kl / sums.n, int(sums.n))


@torch.no_grad()
def _products(
    dictionary: FrozenDictionary,
    written: Float[Tensor, "dict_size d_model"],
    x: Float[Tensor, "tokens 2 d_model"],
    gradient: Float[Tensor, "tokens d_model"],
) -> Float[Tensor, "tokens dict_size"]:
    base, tuned = (dictionary.encode(x[:, m].to(dictionary.dtype)).float() for m in range(2))
    return (-(gradient.float() @ written.T) * (tuned - base)).double().cpu()


def gradient_of_kl(
    model: ResumableModel, state: State, activation: Float[Tensor, "rows seq width"], batch: ChatBatch
) -> tuple[Float[Tensor, "rows seq width"], float]:
    """Return the gradient of the KL of `model`'s own predictions from those with `activation` at the scored tokens,
    summed over response tokens, by that activation; and that KL."""
    predicted = (batch.place[:, 1:] > 0).to(model.device)
    scored = state.batch.scored[..., None]
    x = torch.where(scored, activation, state.activation).clone().requires_grad_()
    final = model.resume_with_graph(_out_of_inference(state), x)[:, :-1][predicted]
    leaf = final.detach().requires_grad_()
    own = state.final[:, :-1][predicted].clone()
    total = 0.0
    with head_alone(model.model) as to_logits:
        vocabulary = to_logits(own[:1]).shape[1]
        for span in torch.arange(len(own)).split(max(1, _LOGITS // vocabulary)):
            with torch.no_grad():
                log_p = predictions.log_probs(to_logits(own[span]))
            kl = predictions.kl(log_p, predictions.log_probs(to_logits(leaf[span]))).sum()
            kl.backward()
            total += float(kl.detach())
    assert leaf.grad is not None
    final.backward(leaf.grad)
    assert x.grad is not None
    return x.grad.cpu() if x.device.type == "cpu" else x.grad, total


def _out_of_inference(state: State) -> State:
    """Return the state with tensors that a graph may keep."""
    return State(state.batch, state.activation.clone(), state.entry.clone(), state.final)


def latent_sets(latents: list[int], groups: dict[str, list[int]]) -> list[PatchSet]:
    """Return nothing, everything, each of the groups, and each latent alone."""
    whole = [PatchSet("none", "none"), PatchSet("all", "all")]
    grouped = [PatchSet(name, "latents", tuple(chosen)) for name, chosen in groups.items()]
    return [*whole, *grouped, *(PatchSet(f"latent_{j}", "latents", (j,)) for j in latents)]
