"""Before a peer is timed: the same weights give the same selected entries, reconstruction and loss.

The weights are random with biases and, where the peer allows it, decoder norms that differ between latents and models,
so that a wrong weighting, bias or orientation shows.
"""

import torch
from torch import Tensor

from benchmarks.throughput.adapters import Build, Known, Peer
from benchmarks.throughput.steps import Shape, planted
from crosscoders import Crosscoder, CrosscoderConfig

TOLERANCE = 1e-4
"""Relative; float32 sums over d_model to 2 d_model terms in another order differ by about 1e-6."""


class Unequal(RuntimeError):
    """A peer does not compute what its adapter says."""


def random_weights(shape: Shape, known: Known) -> Crosscoder:
    """Return weights that the peer can hold; a crosscoder that selects by the peer's rule."""
    g = torch.Generator().manual_seed(7)
    config = CrosscoderConfig(dict_size=shape.dict_size, k=shape.k, d_model=shape.d_model, code_norm=known.code_norm)  # type: ignore[arg-type]
    model = Crosscoder(config).requires_grad_(False)
    width = 2 * shape.d_model
    model.W_dec.normal_(generator=g).mul_(torch.rand(shape.dict_size, 2, 1, generator=g) + 0.5)
    model.W_dec.div_(model.W_dec.flatten(1).norm(dim=1)[:, None, None] if known.unit_norm else width**0.5)
    model.W_enc.copy_(model.W_dec.permute(1, 2, 0) + 0.1 * torch.randn(model.W_enc.shape, generator=g) / width**0.5)
    model.b_enc.normal_(generator=g).mul_(0.1)
    model.b_dec.normal_(generator=g).mul_(0.1)
    return model


def our_latents(model: Crosscoder, x: Tensor, k: int, per_token: bool) -> tuple[Tensor, Tensor]:
    """Return dense latents by the peer's rule, and each entry's distance from the cut, relative to the cut."""
    positive = model.encode(x, gate="relu")
    scaled = positive * model.code_norm
    cut = scaled.topk(k, dim=1).values[:, -1:] if per_token else scaled.flatten().topk(k * len(x)).values[-1]
    return positive * (scaled >= cut), (scaled - cut).abs() / cut


@torch.no_grad()
def require_equal(name: str, known: Known, peer: Peer, weights: Crosscoder, x: Tensor, k: int) -> None:
    """Compare latents, reconstruction and the loss of one step; the step is taken, so the peer is used up.

    An entry may be in one selection only if its scaled value is within TOLERANCE of the cut.

    Raises:
        Unequal: with the quantity that differs.
    """
    ours, distance = our_latents(weights, x, k, known.per_token)
    theirs, x_hat = peer.look(x)
    only_one = (ours > 0) != (theirs > 0)
    n_wrong = int((only_one & (distance > TOLERANCE)).sum())
    if n_wrong:
        raise Unequal(f"{name} selects other entries: {n_wrong} of {k * len(x)} differ and do not lie at the cut.")
    scale = ours.max()
    if not ((ours - theirs).abs().masked_fill(only_one, 0) <= TOLERANCE * scale).all():
        raise Unequal(f"{name} gives its latents other values: {(ours - theirs).abs().max():.3g} apart.")
    same = ~only_one.any(dim=1)
    gap = (weights.decode(ours) - x_hat)[same].norm() / x_hat[same].norm()
    if not gap <= TOLERANCE:
        raise Unequal(f"{name} reconstructs something else: relative difference {gap:.3g}.")
    expected = float(peer.loss(x - x_hat))
    with torch.enable_grad():
        loss = peer.step(x)
        peer.step(x)  # a warm-up may give the first step the rate 0
    if not abs(loss - expected) <= TOLERANCE * abs(expected):
        raise Unequal(f"the step of {name} has loss {loss:.6g}, but its err gives {expected:.6g}.")
    moved, _ = peer.look(x)
    if torch.equal(moved, theirs):
        raise Unequal(f"the step of {name} leaves its latents as they were, so it does not train.")


def check(name: str, known: Known, build: Build, shape: Shape) -> None:
    """Build the peer with random weights and hold it to its claims, on a small shape of the same kind."""
    weights = random_weights(shape, known)
    require_equal(name, known, build(weights, shape.k), weights, planted(shape, 1)[0], shape.k)
