"""A run folder of the tiny pair that tests of the explorer open, and answers by a slow route."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from causal_pairs import POST, uneven_crosscoder
from conftest import Pair
from shared_saes import jumprelu, settings
from torch import Tensor

from crosscoders import ActivationCache
from crosscoders.models import hooks
from crosscoders.training.feed import cache_inputs
from diffing import Session
from diffing.decomposition.command import decompose
from diffing.decomposition.settings import DecomposeSettings
from diffing.explorer.crosscoder import CrosscoderKind
from diffing.explorer.server import ExplorerServer
from diffing.latents.table import scale_run
from diffing.sae.command import sae
from diffing.topk_lora.command import fit
from diffing.topk_lora.settings import TopKFitSettings


def explorer_run(folder: Path, cache_folder: Path) -> Path:
    """Write a run with 24 random latents and its table."""
    cache = ActivationCache(cache_folder)
    uneven_crosscoder(cache_folder).save(folder, provenance=cache_inputs(cache))
    scale_run(folder, cache, n_examples=8)
    return folder


def run_of_every_kind(folder: Path, cache_folder: Path, pair: Pair) -> Path:
    """Write a run with a TopKLoRA, a shared SAE and a decomposition inside it, trained for a few steps."""
    run = explorer_run(folder, cache_folder)
    models = {"base": pair.base, "tuned": pair.tuned, "data": pair.data, "n_tokens": 600, "batch_rows": 8, "steps": 3}
    topk: dict[str, Any] = {"rank": 6, "k": 2, "lr": 0.5, "embedding": True}
    fit(TopKFitSettings(**models, **topk, out=str(run / "topk-lora")))
    sae(settings(pair, run / "sae", jumprelu(folder.parent / "some-sae"), n_documents=0))
    sizes: dict[str, Any] = {"components": 3, "hidden": 4, "warmup_steps": 20, "adversary_steps": 1, "attack_steps": 2}
    sites = ["*layers.0.mlp.down_proj", "*layers.2.*q_proj"]
    decompose(DecomposeSettings(**models, **sizes, sites=sites, top=2, out=str(run / "pieces")))
    return run


def latents_of(session: Session) -> CrosscoderKind:
    """The crosscoder that a session looks at."""
    kind = session.kind()
    assert isinstance(kind, CrosscoderKind)
    return kind


@contextlib.contextmanager
def serving(session: Session) -> Iterator[ExplorerServer]:
    """A server of a session, in a thread of its own."""
    with ExplorerServer(session) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def slow_answer(
    models: tuple[Any, Any], side: int, ids: list[int], n_new: int, edit: Callable[[Tensor], Tensor], amplify: float = 0
) -> list[int]:
    """One whole pass of both models for each token, nothing kept; edit: (seq, 2, d_model) -> what stands in model
    `side`. The likeliest token each time, of those that have 5% of the largest probability."""
    written = list(ids)
    for _ in range(n_new):
        batch = torch.tensor([written])
        seen = [hooks.run_to(m, [POST], batch, torch.ones_like(batch))[POST][0] for m in models]
        changed = edit(torch.stack(seen, dim=1).clone())
        with torch.no_grad():
            with hooks.replace(models[side], POST, lambda _, changed=changed: changed[None]):
                own = models[side](batch, use_cache=False).logits[0, -1].log_softmax(-1)
            other = models[1 - side](batch, use_cache=False).logits[0, -1].log_softmax(-1)
        allowed = own >= own.max() + torch.tensor(0.05).log()
        mixed = torch.where(allowed, (1 + amplify) * own - amplify * other, -torch.inf)
        written.append(int(mixed.argmax()))
    return written[len(ids) :]
