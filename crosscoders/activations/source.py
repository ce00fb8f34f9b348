"""Step 2 of the data flow, first half: tokens -> paired activations.

`make_plan` tokenises and checks everything that can be wrong before a model loads; `ActivationSource` runs both models
over the plan and yields scored tokens in a fixed order; `open_source` does both. The cache writes what the source
yields, the live stream trains on it directly.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.activations.plan import Plan, make_plan
from crosscoders.activations.scored import DTYPES, Tokens
from crosscoders.activations.settings import CacheConfig
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.models.pair import ModelPair, load_pair
from crosscoders.text.padding import padding_id
from crosscoders.text.tokens import Rows, iterate_scored, pad_rows


class _Pass(NamedTuple):
    """One forward pass of both models; on a GPU its copies to pinned memory may still be under way."""

    columns: dict[str, Tensor]
    """Of `Tokens`, all but the activations."""
    activations: dict[str, Float[Tensor, "tokens n_models d_model"]]
    """By hook point, in the dtype of the cache."""
    finite: dict[str, Bool[Tensor, "tokens n_models"]]
    copied: torch.cuda.Event | None
    keep: slice
    """The tokens that were asked for."""


class ActivationSource:
    """Runs the pair over planned rows. Token number t is the same token in every run of the same plan."""

    def __init__(
        self, pair: ModelPair, rows: Rows, *, hook_point: str | list[str], batch_rows: int, dtype: torch.dtype
    ) -> None:
        self.pair, self.rows, self.dtype = pair, rows, dtype
        self.hook_points = [hook_point] if isinstance(hook_point, str) else list(hook_point)
        self.batches = rows.batches(batch_rows)
        self.spans = list(iterate_scored(rows, self.batches))
        self.pad_id = padding_id(pair.info.tokenizer, pair.info.n_ids)
        self.is_checked = False
        self._models = threading.Lock()  # a pass of another thread would run through the hooks of this one

    def read(self, start: int, stop: int) -> Iterator[Tokens]:
        """Yield the scored tokens start to stop at the (first) hook point, forward pass by forward pass."""
        for tokens in self.read_points(start, stop):
            yield tokens[self.hook_points[0]]

    def read_points(self, start: int, stop: int) -> Iterator[dict[str, Tokens]]:
        """Yield the scored tokens start to stop at every hook point. A pass is started before the one before it is
        handed out, so that a GPU computes while its results are copied and written; passes without such tokens are not
        run."""
        running: _Pass | None = None
        for numbers, (first, last) in zip(self.batches, self.spans, strict=True):
            if last > start and first < stop:
                started = self._start(numbers, slice(max(start - first, 0), min(stop, last) - first))
                if running is not None:
                    yield self._finish(running)
                running = started
        if running is not None:
            yield self._finish(running)

    def _start(self, numbers: Int[np.ndarray, " rows"], keep: slice) -> _Pass:
        batch = pad_rows(self.rows, numbers, self.pad_id)
        scored = batch.scored
        on_gpu = self.pair.device.type == "cuda"
        # Numbers instead of a mask: a mask on the GPU would have to wait for it to count them.
        chosen = scored.flatten().nonzero()[:, 0].to(self.pair.device, non_blocking=True)
        activations, finite = {}, {}
        with self._models:
            at_points = self.pair.activations_at(batch)
        for name in self.hook_points:
            x = at_points.pop(name).flatten(0, 1)[chosen].to(self.dtype)
            finite[name] = torch.isfinite(x).all(dim=-1).to("cpu", non_blocking=True)
            activations[name] = x.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(self.pair.device))
        positions = torch.arange(scored.shape[1]).expand(scored.shape)[scored]
        documents = torch.from_numpy(batch.numbers)[:, None].expand(scored.shape)[scored]
        row_starts = torch.from_numpy(self.rows.offsets)[documents]
        columns = {
            "token_ids": batch.ids[scored].int(),
            "positions": positions.int(),
            "document_ids": documents.int(),
            "roles": torch.from_numpy(self.rows.roles)[row_starts + positions],
            "groups": torch.from_numpy(self.rows.groups)[documents].int(),
        }
        return _Pass(columns, activations, finite, copied, keep)

    def _finish(self, running: _Pass) -> dict[str, Tokens]:
        if running.copied is not None:
            running.copied.synchronize()
        self._require_finite(running)
        if not self.is_checked:
            self._require_difference(running)
            self.is_checked = True
        return {
            name: Tokens(activations=x, **running.columns).slice(running.keep.start, running.keep.stop)
            for name, x in running.activations.items()
        }

    def _require_finite(self, running: _Pass) -> None:
        for hook_point, finite in running.finite.items():
            if finite.all():
                continue
            token, model = (~finite).nonzero()[0].tolist()
            name = (self.pair.info.base, self.pair.info.tuned)[model]
            is_whole = next(self.pair.models[model].parameters()).dtype == torch.float32
            mend = "Look for NaN in its weights, or take" if is_whole else "Use model_dtype float32, or take"
            raise CorruptData(
                f"model {name!r} gives a non-finite activation at {hook_point!r}, "
                f"document {int(running.columns['document_ids'][token])}, "
                f"position {int(running.columns['positions'][token])}. "
                f"Whole shards are kept. {mend} the document out."
            )

    def _require_difference(self, running: _Pass) -> None:
        """Raise InputError where both models give the same numbers, which a crosscoder could learn nothing from."""
        info = self.pair.info
        for hook_point, x in running.activations.items():
            if torch.equal(x[:, 0], x[:, 1]):
                raise InputError(
                    f"tuned model {info.tuned!r} has the same activations as the base {info.base!r} at {hook_point!r} "
                    f"on the first {len(x):,} tokens: tuned equals base. Name another tuned model, or a hook point "
                    "that its training changed."
                )


def open_source(
    config: CacheConfig, plan: Plan | None = None, *, hook_points: list[str] | None = None, device: str | None = None
) -> ActivationSource:
    """Load the pair that `config` names and make its source, ready to be read; nothing is written.

    hook_points: some of the config's, default all; device: in place of the config's.

    Raises:
        InputError: anything that the user's settings or data get wrong.
        EnvironmentFault: the device is not there.
    """
    plan = plan or make_plan(config)
    names = hook_points or [str(point.hook_point) for point in config.points()]
    pair = load_pair(
        config.base, config.tuned, names, device=device or config.device, dtype=config.model_dtype, info=plan.info
    )
    return ActivationSource(pair, plan.rows, hook_point=names, batch_rows=config.batch_rows, dtype=DTYPES[config.dtype])
