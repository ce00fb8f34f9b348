"""Batches for training: (batch, n_models, d_model), from a cache, live from the models, or from a tensor.

One rule gives the order for all three: the tokens are cut into buffers of `buffer_tokens` in cache order; inside a
buffer they are permuted by a generator seeded with (seed, epoch, buffer). A batch never crosses a buffer, so up to
batch_size - 1 tokens of each buffer, others in each epoch, are not read (all of a last buffer shorter than one batch).
So the batch of step s is a pure function of (seed, s), a run can start at any step, and a live stream trains the same
weights as a cache. The next buffer is filled in a thread while the batches of one are taken, so two are in memory.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.scored import Moments, moments_of
from crosscoders.activations.source import ActivationSource
from crosscoders.common.errors import InputError


@runtime_checkable
class BatchStream(Protocol):
    """What the trainer needs of its data."""

    d_model: int
    n_models: int
    batch_size: int
    moments: Moments
    """For the input mean and scale."""

    def batches(self, start_step: int, stop_step: int) -> Iterator[Float[Tensor, "batch n_models d_model"]]:
        """Yield the batches of the steps from one to before the other, in any float dtype, in memory of their own."""
        ...


class Place(NamedTuple):
    """Where a step finds its batch."""

    epoch: int
    buffer: int
    batch: int


class BufferedStream:
    """The order described above, over any `read(start, stop)` that yields these tokens in parts."""

    def __init__(
        self,
        read: Callable[[int, int], Iterable[Float[Tensor, "_ n_models d_model"]]],
        *,
        n_tokens: int,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        moments: Moments,
    ) -> None:
        buffer_tokens = max(buffer_tokens, batch_size)
        if n_tokens < batch_size:
            raise InputError(
                f"the data has {n_tokens} tokens, less than one batch of {batch_size}. Lower batch_size or add data."
            )
        self._read, self.seed, self.batch_size = read, seed, batch_size
        self.moments = moments
        self.n_models, self.d_model = len(moments.mean), len(moments.mean[0])
        edges = [*range(0, n_tokens, buffer_tokens), n_tokens]
        self.spans = [(a, b) for a, b in pairwise(edges) if b - a >= batch_size]
        self.batches_in = [(b - a) // batch_size for a, b in self.spans]
        self._held: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.batches_in)

    def place(self, step: int) -> Place:
        """Return the epoch, buffer and batch of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        for buffer, n in enumerate(self.batches_in):
            if batch < n:
                return Place(epoch, buffer, batch)
            batch -= n
        raise AssertionError("a step lies within its epoch")

    def batches(self, start_step: int, stop_step: int) -> Iterator[Float[Tensor, "batch n_models d_model"]]:
        pinned = torch.cuda.is_available()  # a copy to a GPU then need not wait
        leaving = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="buffer") as beside:
            try:
                following = self._submit(beside, start_step, leaving)
                while start_step < stop_step:
                    epoch, buffer, first = self.place(start_step)
                    last = min(self.batches_in[buffer], first + stop_step - start_step)
                    start_step += last - first
                    x = following.result()
                    if start_step < stop_step:
                        following = self._submit(beside, start_step, leaving)
                    order = self._order(epoch, buffer)
                    for i in range(first, last):
                        rows = order[i * self.batch_size : (i + 1) * self.batch_size]
                        batch = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, pin_memory=pinned)
                        yield torch.index_select(x, 0, rows, out=batch)
                    del x  # free the old buffer before the one after the next is filled
            finally:
                leaving.set()

    def _order(self, epoch: int, buffer: int) -> Int[Tensor, " tokens"]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}:{epoch}:{buffer}").getrandbits(62))
        start, stop = self.spans[buffer]
        return torch.randperm(stop - start, generator=generator)

    def _submit(self, beside: ThreadPoolExecutor, step: int, leaving: threading.Event) -> Future[Tensor]:
        return beside.submit(self._buffer, self.place(step).buffer, leaving)

    def _buffer(self, number: int, leaving: threading.Event) -> Float[Tensor, "tokens n_models d_model"]:
        """Return a buffer, read again only if it is not the last one that was: for data of one buffer, and for the
        first and the last steps, which are asked for twice."""
        if self._held is None or self._held[0] != number:
            self._held = None
            self._held = (number, self._filled(*self.spans[number], leaving))
        return self._held[1]

    def _filled(self, start: int, stop: int, leaving: threading.Event) -> Float[Tensor, "tokens n_models d_model"]:
        """Return tokens start to stop in one tensor, into which parts are copied one by one."""
        x, n_filled = torch.empty(0), 0
        for part in self._read(start, stop):
            if leaving.is_set():
                raise CancelledError
            if len(part) == stop - start:
                return part
            if not n_filled:
                x = torch.empty(stop - start, *part.shape[1:], dtype=part.dtype)
            x[n_filled : n_filled + len(part)] = part
            n_filled += len(part)
        return x


def cached_stream(
    cache: ActivationCache, *, batch_size: int, buffer_tokens: int = 524_288, seed: int = 0, n_tokens: int | None = None
) -> BufferedStream:
    """Return batches from the first `n_tokens` of a cache (default: all)."""
    return BufferedStream(
        lambda start, stop: (tokens.activations for tokens in cache.parts(start, stop)),
        n_tokens=len(cache) if n_tokens is None else n_tokens,
        batch_size=batch_size,
        buffer_tokens=buffer_tokens,
        seed=seed,
        moments=cache.moments,
    )


def live_stream(
    source: ActivationSource,
    *,
    n_tokens: int,
    batch_size: int,
    buffer_tokens: int = 524_288,
    seed: int = 0,
    moments: Moments | None = None,
) -> BufferedStream:
    """Return the batches of `cached_stream` over the same plan, computed when they are needed; nothing is written.

    moments: the cache's, which decide input mean and scale only; default: those of the first 16,384 tokens.
    """

    def read(start: int, stop: int) -> Iterator[Float[Tensor, "_ n_models d_model"]]:
        return (tokens.activations for tokens in source.read(start, stop))

    return BufferedStream(
        read,
        n_tokens=n_tokens,
        batch_size=batch_size,
        buffer_tokens=buffer_tokens,
        seed=seed,
        moments=moments or moments_of(torch.cat(list(read(0, min(16_384, n_tokens))))),
    )


def tensor_stream(
    x: Float[Tensor, "tokens n_models d_model"], *, batch_size: int, buffer_tokens: int = 524_288, seed: int = 0
) -> BufferedStream:
    """Return batches from activations in memory, such as planted ones."""
    return BufferedStream(
        lambda start, stop: [x[start:stop]],
        n_tokens=len(x),
        batch_size=batch_size,
        buffer_tokens=buffer_tokens,
        seed=seed,
        moments=moments_of(x),
    )
