"""A run folder of the tiny pair that tests of the explorer open, and answers by a slow route."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from causal_pairs import POST, uneven_crosscoder
from torch import Tensor

from crosscoders import ActivationCache
from crosscoders.models import hooks
from crosscoders.training.feed import cache_inputs
from diffing import Session
from diffing.explorer.server import ExplorerServer
from diffing.latents.table import scale_run


def explorer_run(folder: Path, cache_folder: Path) -> Path:
    """Write a run with 24 random latents and its table."""
    cache = ActivationCache(cache_folder)
    uneven_crosscoder(cache_folder).save(folder, provenance=cache_inputs(cache))
    scale_run(folder, cache, n_examples=8)
    return folder


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
