"""Step 2 of the data flow, first half: tokens -> paired activations.

`make_plan` tokenises and checks everything that can be wrong before a model loads; `ActivationSource` runs both models
over the plan and yields scored tokens in a fixed order; `open_source` does both. The cache writes what the source
yields, the live stream trains on it directly.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from crosscoders import store
from crosscoders.config import CacheConfig
from crosscoders.errors import CorruptData
from crosscoders.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.tokens import Rows, iterate_scored, pad_rows, read_template, tokenize_documents

FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Tokens(NamedTuple):
    """Scored tokens with their activations, in cache order."""

    activations: Float[Tensor, "tokens n_models d_model"]
    """In the dtype of the cache."""
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """Position in the row, counted from 0 with the beginning-of-sequence token."""
    document_ids: Int[Tensor, " tokens"]
    roles: UInt8[Tensor, " tokens"]
    """Index into `tokens.ROLES`."""
    groups: Int[Tensor, " tokens"]
    """Index into the manifest's `groups`."""

    def slice(self, start: int, stop: int) -> "Tokens":
        return Tokens(*(t[start:stop] for t in self))


def concatenate(parts: list[Tokens]) -> Tokens:
    """The parts end to end; one part alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class ActivationSource:
    """Runs the pair over planned rows. Token number t is the same token in every run of the same plan."""

    def __init__(self, pair: ModelPair, rows: Rows, *, hook_point: str, batch_rows: int, dtype: torch.dtype) -> None:
        self.pair, self.rows, self.hook_point, self.dtype = pair, rows, hook_point, dtype
        self.batches = rows.batches(batch_rows)
        self.spans = list(iterate_scored(rows, self.batches))
        pad = pair.info.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)

    def read(self, start: int, stop: int) -> Iterator[Tokens]:
        """Scored tokens start to stop, forward pass by forward pass."""
        for numbers, (first, last) in zip(self.batches, self.spans, strict=True):
            if last > start and first < stop:
                yield self._run(numbers).slice(max(start - first, 0), min(stop, last) - first)

    def _run(self, numbers: Int[np.ndarray, " rows"]) -> Tokens:
        batch = pad_rows(self.rows, numbers, self.pad_id)
        scored = torch.from_numpy(batch.scored)
        x = self.pair.activations(batch, self.hook_point)[scored.to(self.pair.device)]
        positions = torch.arange(scored.shape[1]).expand(scored.shape)[scored]
        documents = torch.from_numpy(batch.rows)[:, None].expand(scored.shape)[scored]
        self._require_finite(x, documents, positions)
        row_starts = torch.from_numpy(self.rows.offsets)[documents]
        return Tokens(
            activations=x.to(self.dtype).cpu(),
            token_ids=torch.from_numpy(batch.ids)[scored].int(),
            positions=positions.int(),
            document_ids=documents.int(),
            roles=torch.from_numpy(self.rows.roles)[row_starts + positions],
            groups=torch.from_numpy(self.rows.groups)[documents].int(),
        )

    def _require_finite(
        self,
        x: Float[Tensor, "tokens n_models d_model"],
        documents: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
    ) -> None:
        finite = torch.isfinite(x.to(self.dtype)).all(dim=-1).cpu()
        if finite.all():
            return
        token, model = (~finite).nonzero()[0].tolist()
        name = (self.pair.info.base, self.pair.info.tuned)[model]
        raise CorruptData(
            f"model {name!r} gives a non-finite activation at {self.hook_point!r}, "
            f"document {int(documents[token])}, position {int(positions[token])}. "
            "Whole shards are kept. Use --model-dtype float32, or take the document out."
        )


class Plan(NamedTuple):
    info: PairInfo
    rows: Rows
    fingerprint: dict[str, Any]
    """Everything that decides the bytes of the cache."""


def make_plan(config: CacheConfig) -> Plan:
    """Tokenise and check everything that can be wrong before a model loads."""
    info = inspect_pair(config.base, config.tuned, [config.hook_point], tokenizer=config.tokenizer)
    template = read_template(config.chat_template)
    rows = tokenize_documents(config, info.tokenizer, template)
    fingerprint = {
        "format_version": FORMAT_VERSION,
        **info.hashes(),
        "template_hash": store.hash_json(template or info.tokenizer.chat_template),
        "token_hash": store.hash_json(
            [
                store.checksum(array.tobytes())
                for array in (rows.ids, rows.roles, rows.scored, rows.offsets, rows.groups)
            ]
        ),
        "group_hash": store.hash_json(rows.group_names),
        "hook_point": config.hook_point,
        "n_models": 2,
        "d_model": info.d_model,
        "dtype": config.dtype,
        "model_dtype": config.model_dtype,
        "n_tokens": config.n_tokens,
        "shard_tokens": config.shard_tokens,
        "batch_rows": config.batch_rows,
    }
    return Plan(info, rows, fingerprint)


def open_source(config: CacheConfig, plan: Plan | None = None) -> ActivationSource:
    """Load the pair that `config` names and make its source, ready to be read; nothing is written.

    Raises:
        InputError: anything that the user's settings or data get wrong.
        EnvironmentFault: the device is not there.
    """
    plan = plan or make_plan(config)
    pair = load_pair(
        config.base, config.tuned, config.hook_point, device=config.device, dtype=config.model_dtype, info=plan.info
    )
    return ActivationSource(
        pair, plan.rows, hook_point=config.hook_point, batch_rows=config.batch_rows, dtype=DTYPES[config.dtype]
    )
