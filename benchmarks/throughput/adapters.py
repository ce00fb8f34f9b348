"""Training steps of other toolkits behind one interface, with our weights copied into them.

Each adapter uses the public classes of an installed package or of a checkout. A toolkit without a crosscoder trains an
SAE on the concatenation (batch, n_models * d_model), which is the same products. `equality` holds an adapter to what it
claims before anything is timed.
"""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.throughput.steps import Step
from crosscoders import Crosscoder

UNIT_NORM = 0.5**0.5
"""Norm of each model's decoder row for which a latent's concatenated decoder over two models has norm 1."""


class Peer(NamedTuple):
    """One toolkit, ready to train."""

    step: Step
    look: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Latents (batch, dict_size) in our units, selected as in training, and x_hat (batch, n_models, d_model)."""
    loss: Callable[[Tensor], Tensor]
    """The loss that its step should give, from err = x - x_hat."""


@contextlib.contextmanager
def foreign_import() -> Iterator[None]:
    """Shield the process while others' code is imported.

    Its prints go to stderr, its warnings are not ours, and what it replaces in torch.Tensor and torch.nn.Module comes
    back (nnsight replaces Tensor.backward).
    """
    before = {kind: dict(vars(kind)) for kind in (torch.Tensor, torch.nn.Module)}
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for kind, attributes in before.items():
            for name, value in attributes.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)


Build = Callable[[Crosscoder, int], Peer]
"""Makes a peer with the weights of a crosscoder and k active latents per token."""


class Known(NamedTuple):
    """What there is to know about a toolkit before it is imported."""

    package: str
    """What is imported."""
    pip: str | None
    """Its name for pip, None where there is only a checkout."""
    build: Build
    code_norm: str
    """Rule of `CrosscoderConfig.code_norm` by which it selects."""
    unit_norm: bool
    """Whether it keeps each latent's concatenated decoder at norm 1."""
    per_token: bool
    """Whether it takes the k largest of each token, not k * batch of the batch."""
    note: str


def squared(err: Tensor) -> Tensor:
    return err.pow(2).sum(dim=(1, 2)).mean()


def saelens(weights: Crosscoder, k: int) -> Peer:
    """Build SAELens: BatchTopKTrainingSAE and one `SAETrainer.step` with its default Adam."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    width, dict_size = weights.W_dec[0].numel(), len(weights.W_dec)
    config = BatchTopKTrainingSAEConfig(d_in=width, d_sae=dict_size, k=float(k), apply_b_dec_to_input=False)
    sae = BatchTopKTrainingSAE(config)
    copy_(sae, "W_enc", weights.W_enc.flatten(0, 1))
    copy_(sae, "b_enc", weights.b_enc)
    copy_(sae, "W_dec", weights.W_dec.flatten(1))
    copy_(sae, "b_dec", weights.b_dec.flatten())
    settings = SAETrainerConfig(total_training_samples=2**40, train_batch_size_samples=1024, lr=1e-4, lr_end=1e-5)
    trainer = SAETrainer(settings, sae, data_provider=iter(()))

    def step(x: Tensor) -> float:
        loss = trainer.step(x.flatten(1)).loss.item()
        trainer.n_training_steps += 1
        return float(loss)

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled, _ = sae.encode_with_hidden_pre(x.flatten(1))
        return scaled / sae.W_dec.norm(dim=1), sae.decode(scaled).view_as(x)

    return Peer(step, look, squared)


def dictionary_learning(weights: Crosscoder, k: int) -> Peer:
    """Build dictionary_learning: `BatchTopKTrainer.update`; its decoder bias is also taken off the input."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        steps=10**9, activation_dim=weights.W_dec[0].numel(), dict_size=len(weights.W_dec), k=k, layer=0,
        lm_name="none", lr=1e-4, device="cpu",
    )  # fmt: skip
    ae = trainer.ae
    copy_linear_sae_(ae, weights)
    copy_(ae.decoder, "weight", weights.W_dec.flatten(1).T)
    number = iter(range(1, 10**9))  # step 0 would replace the decoder bias

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = ae.encode(x.flatten(1), use_threshold=False)
        return latents, ae.decode(latents).view_as(x)

    return Peer(lambda x: float(trainer.update(next(number), x.flatten(1))), look, squared)


def sparsify(weights: Crosscoder, k: int) -> Peer:
    """Build sparsify: `SparseCoder` in the order of `Trainer.fit`, which needs a language model; with default Adam.

    Its loss is divided by the variance of the batch, which the check puts back; versions that take no `total_variance`
    compute the same one themselves.
    """
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(weights.W_dec[0].numel(), SparseCoderConfig(num_latents=len(weights.W_dec), k=k))
    copy_linear_sae_(sae, weights)
    copy_(sae, "W_dec", weights.W_dec.flatten(1))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    since_fired = torch.zeros(len(weights.W_dec), dtype=torch.int64)
    accepted = inspect.signature(sae.forward).parameters

    def step(x: Tensor) -> float:
        flat = x.flatten(1)
        sae.set_decoder_norm_to_unit_norm()
        variance = (flat - flat.mean(0)).pow(2).sum()
        given = {"y": flat, "dead_mask": since_fired > 10_000_000, "total_variance": variance}
        out = sae(flat, **{name: value for name, value in given.items() if name in accepted})
        fired = torch.zeros(len(since_fired), dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(flat))
        since_fired[fired] = 0
        return out.fvu.item() * variance.item() / len(flat)

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = sae.encode(x.flatten(1))
        latents = torch.zeros(len(x), len(weights.W_dec)).scatter(1, indices, values)
        return latents, sae.decode(values, indices).view_as(x)

    return Peer(step, look, squared)


def crosscoder_learning(weights: Crosscoder, k: int) -> Peer:
    """Build the crosscoder fork of dictionary_learning: `BatchTopKCrossCoderTrainer.update`."""
    from dictionary_learning.trainers.crosscoder import BatchTopKCrossCoderTrainer

    dict_size, n_models, d_model = weights.W_dec.shape
    trainer = BatchTopKCrossCoderTrainer(
        steps=10**9, activation_dim=d_model, dict_size=dict_size, k=k, layer=0, lm_name="none", num_layers=n_models,
        lr=1e-4, device="cpu",
    )  # fmt: skip
    ae = trainer.ae
    copy_(ae.encoder, "weight", weights.W_enc)
    copy_(ae.encoder, "bias", weights.b_enc)
    copy_(ae.decoder, "weight", weights.W_dec.transpose(0, 1))
    copy_(ae.decoder, "bias", weights.b_dec)
    number = iter(range(1, 10**9))  # step 0 would replace the decoder bias

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = ae.encode(x, use_threshold=False)
        return latents, ae.decode(latents)

    # update may normalise its input in place, so it gets a copy
    return Peer(lambda x: float(trainer.update(next(number), x.clone())), look, lambda err: err.norm(dim=2).mean())


def crosscode(weights: Crosscoder, k: int) -> Peer:
    """Build crosscode: its acausal crosscoder and reconstruction loss in the order of its `Trainer.train`.

    The trainer itself needs models and a logging service. Adam is the default one.
    """
    from crosscode.models.acausal_crosscoder import ModelHookpointAcausalCrosscoder
    from crosscode.models.activations.topk import BatchTopkActivation
    from crosscode.utils import calculate_reconstruction_loss_summed_norm_MSEs

    dict_size, n_models, d_model = weights.W_dec.shape
    model = ModelHookpointAcausalCrosscoder(
        n_models=n_models, n_hookpoints=1, d_model=d_model, n_latents=dict_size, activation_fn=BatchTopkActivation(k)
    )
    copy_(model, "W_enc_MPDL", weights.W_enc.unsqueeze(1))
    copy_(model, "b_enc_L", weights.b_enc)
    copy_(model, "W_dec_LMPD", weights.W_dec.unsqueeze(2))
    copy_(model, "b_dec_MPD", weights.b_dec.unsqueeze(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        out = model.forward_train(x.unsqueeze(2))
        loss = calculate_reconstruction_loss_summed_norm_MSEs(x.unsqueeze(2), out.recon_acts_BMPD)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        out = model.forward_train(x.unsqueeze(2))
        return out.latents_BL, out.recon_acts_BMPD.squeeze(2)

    return Peer(step, look, squared)


def copy_(owner: object, name: str, source: Tensor) -> None:
    """Copy into the memory that is there, so that a parameter keeps its layout.

    Raises:
        TypeError: there is no such parameter, or it has another shape.
    """
    target = getattr(owner, name)
    if not isinstance(target, Tensor) or target.shape != source.shape:
        theirs = tuple(target.shape) if isinstance(target, Tensor) else target
        raise TypeError(f"{type(owner).__name__}.{name} is {theirs}, not of shape {tuple(source.shape)}")
    with torch.no_grad():
        target.copy_(source)


def copy_linear_sae_(sae: Any, weights: Crosscoder) -> None:
    """Copy our encoder into one that takes the decoder bias off its input: (x - b_dec) W + (b_enc + b_dec W)."""
    copy_(sae.encoder, "weight", weights.W_enc.flatten(0, 1).T)
    copy_(sae.encoder, "bias", weights.b_enc + weights.b_dec.flatten() @ weights.W_enc.flatten(0, 1))
    copy_(sae, "b_dec", weights.b_dec.flatten())


SAE_NOTE = "an SAE on the concatenation, squared error"
PEERS = {
    "saelens": Known("sae_lens", "sae-lens", saelens, "concat", False, False, SAE_NOTE),
    "dictionary_learning": Known(
        "dictionary_learning", "dictionary-learning", dictionary_learning, "none", True, False,
        f"{SAE_NOTE}, decoder kept at unit norm, so no norm in the selection",
    ),
    "sparsify": Known(
        "sparsify", "eai-sparsify", sparsify, "none", True, True,
        f"{SAE_NOTE}, decoder kept at unit norm, k per token and no clipping: less work than BatchTopK",
    ),
    "crosscoder_learning": Known(
        "dictionary_learning", None, crosscoder_learning, "sum", False, False, "a crosscoder, the same loss as ours",
    ),
    "crosscode": Known(
        "crosscode", None, crosscode, "none", False, False,
        "a crosscoder, squared error, no norm in the selection, no clipping, no dead latents counted",
    ),
}  # fmt: skip
