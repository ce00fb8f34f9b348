"""Shards and manifest of one cache, or of one part of it: what is there, what is missing, what is published last.

    progress.json   while it is written: the plan and the finished shards, with their sums
    part.json       of a finished part: the same with `part`, for `merge_parts`
    manifest.json   of a finished cache: sums made into statistics

`ShardWriter` holds one folder; `build_manifest` makes the manifest of a cache and is the same for one run and for
merged parts.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from crosscoders.activations.outliers import outlier_statistics, outlier_sums, within
from crosscoders.activations.plan import FORMAT_VERSION, Plan
from crosscoders.activations.scored import DTYPES, Tokens
from crosscoders.activations.settings import CacheConfig, Part
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.folders import Folder
from crosscoders.common.records import FileRecord, Named, Record
from crosscoders.models.names import identity

COLUMN_BYTES = 17
"""Of one token, beside its activations."""
BLOCK = 512
"""Tokens that are summed in float32."""
SUMS = ("sum", "norm_sum", "square_sum")


def bytes_per_token(config: CacheConfig, d_model: int) -> int:
    """Return the bytes of a token on disk, at one hook point."""
    return 2 * DTYPES[config.dtype].itemsize * d_model + COLUMN_BYTES


class Shard(FileRecord):
    """A finished shard, in a manifest."""

    name: str
    n_tokens: int = Field(gt=0)


IfThere = Annotated[list[float], Field(default_factory=list)]
"""A number of each model, which shards of earlier versions lack."""


class SummedShard(Shard):
    """The same before the sums are made into statistics."""

    sum: list[list[float]]
    norm_sum: list[float]
    square_sum: list[float]
    norm_max: list[float]
    norm_median_sum: IfThere
    spread: IfThere
    top_tokens: IfThere
    top_spread: IfThere
    outlying_tokens: IfThere
    outlying_spread: IfThere
    left_out: int = 0

    def lengths(self) -> set[tuple[str, int]]:
        """Return the lengths of the lists that it has, which are one for each kind of list."""
        values = [getattr(self, name) for name in self.model_fields_set]
        of_models = {("n_models", len(value)) for value in values if isinstance(value, list)}
        return of_models | {("d_model", len(value)) for value in self.sum}


class ProgressRecord(Record):
    """progress.json; the plan in it is compared with the present one, key by key."""

    format_version: int
    shards: list[SummedShard]

    @model_validator(mode="after")
    def _agrees(self) -> "ProgressRecord":
        if len(set().union(*(shard.lengths() for shard in self.shards))) > 2:
            raise ValueError("the sums of its shards are of different lengths")
        return self


class PartRecord(ProgressRecord):
    """part.json"""

    part: str
    config: dict[str, Any]
    n_tokens: int
    shard_tokens: int = Field(gt=0)


class Statistics(Record):
    """Over all tokens of a cache, for each model."""

    n_tokens: int
    mean: list[list[float]]
    mean_norm: list[float]
    mean_squared_norm: list[float]


class Manifest(Record):
    """manifest.json of a finished cache."""

    version = FORMAT_VERSION
    again = "cache again"
    format_version: int
    base: Named
    tuned: Named
    tokenizer_hash: str
    template_hash: str
    token_hash: str
    hook_point: str
    n_models: int
    d_model: int
    dtype: Literal["bfloat16", "float32"]
    n_tokens: int
    drop_bos: bool
    groups: list[str]
    counts: dict[str, int]
    statistics: Statistics
    config: CacheConfig
    shards: list[Shard]

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        n_tokens = sum(shard.n_tokens for shard in self.shards)
        if n_tokens != self.statistics.n_tokens or n_tokens > self.n_tokens:  # fewer where outlying norms are left out
            raise ValueError(f"n_tokens is {self.n_tokens} but its shards have {n_tokens}")
        widths = [len(mean) for mean in self.statistics.mean]
        if widths != [self.d_model] * self.n_models or len(self.statistics.mean_norm) != self.n_models:
            raise ValueError("n_models, d_model and statistics do not agree")
        return self


FINAL = ("manifest.json", "part.json")
RECORDS: dict[str, type[Record]] = {
    "manifest.json": Manifest, "part.json": PartRecord, "progress.json": ProgressRecord
}  # fmt: skip


class ShardWriter:
    """The shards of one hook point in one folder; those of an earlier run of the same plan are kept.

    Raises:
        InputError: the folder holds another cache, or another part.
    """

    def __init__(self, config: CacheConfig, folder: Folder, plan: Plan, part: Part | None) -> None:
        self.config, self.folder, self.plan, self.part = config, folder, plan, part
        self.hook_point = str(config.hook_point)
        n_shards = -(-config.n_tokens // config.shard_tokens)
        self.numbers = part.shards(n_shards) if part else range(n_shards)
        self.shards: list[dict[str, Any]] = []
        self.is_complete = False

    def resume(self) -> None:
        """Find what an earlier run has left."""
        there = self.folder.sizes()
        wanted = self._identity()
        for name, model in RECORDS.items():
            if name in there:
                recorded = self.folder.read_model(name, model)
                key = first_difference(recorded, wanted)
                if key:
                    raise InputError(
                        f"{self.folder} holds a cache with another {key} ({recorded.get(key)!r}, now {wanted[key]!r}). "
                        "Choose another --out, or remove that folder."
                    )
                self.shards = list(recorded["shards"])
                self.is_complete = name in FINAL
                return

    def _identity(self) -> dict[str, Any]:
        return {**self.plan.fingerprint(self.hook_point), "part": str(self.part) if self.part else None}

    @property
    def next_shard(self) -> int:
        return self.numbers.start + len(self.shards)

    def write(self, number: int, tokens: Tokens) -> None:
        """Publish the next shard, and progress after it."""
        name, n_planned = shard_name(number), len(tokens.token_ids)
        tokens = within(tokens, self.config.max_norm_multiple)
        counts = {"n_tokens": len(tokens.token_ids), "left_out": n_planned - len(tokens.token_ids)}
        with ThreadPoolExecutor(1) as beside:  # sums take about as long as the write, and neither holds the interpreter
            sums = beside.submit(_sums, tokens.activations)
            written = self.folder.write_tensors(name, tokens._asdict())
        self.shards.append({"name": name, **counts, **written._asdict(), **sums.result()})
        self.folder.write_json("progress.json", {**self._progress(), "shards": self.shards})

    def _progress(self) -> dict[str, Any]:
        part = {"part": str(self.part)} if self.part else {}
        return {**self.plan.fingerprint(self.hook_point), **part}

    def finish(self) -> None:
        """Publish the manifest, or part.json."""
        rows, skip_first = self.plan.rows, self.config.skip_first
        header = {
            **self.plan.fingerprint(self.hook_point),
            "context_length": self.config.context_length,
            "drop_bos": self.config.drop_bos,
            "skip_first": skip_first if skip_first is not None else min(1, rows.counts["skipped_tokens"]),
            "groups": rows.group_names,
            "counts": rows.counts,
            "refused": rows.refused,
        }
        settings = to_dict(self.config) | {"data": [to_dict(source) for source in self.config.data_config().sources()]}
        if self.part:
            whole = {**header, "part": str(self.part), "config": settings, "shards": self.shards}
            self.folder.write_json("part.json", whole)
        else:
            self.folder.write_json("manifest.json", build_manifest(header, settings, self.shards))
        self.folder.remove("progress.json")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def first_difference(recorded: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Return the first key of `wanted` whose recorded value is another one."""
    return next((key for key, value in wanted.items() if identity(recorded.get(key)) != identity(value)), None)


def build_manifest(header: dict[str, Any], settings: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest of a finished cache from its shards with their sums."""
    n = sum(shard["n_tokens"] for shard in shards)
    sums = {key: np.sum([shard[key] for shard in shards], axis=0) for key in SUMS}
    statistics = {
        "n_tokens": n,
        "mean": (sums["sum"] / n).tolist(),
        "mean_norm": (sums["norm_sum"] / n).tolist(),
        "mean_squared_norm": (sums["square_sum"] / n).tolist(),
        "left_out_tokens": sum(shard.get("left_out", 0) for shard in shards),
        "max_norm": np.max([shard["norm_max"] for shard in shards], axis=0).tolist(),
        **outlier_statistics(shards),
    }
    entries = [{key: shard[key] for key in ("name", "n_tokens", "n_bytes", "checksum")} for shard in shards]
    return {**header, "statistics": statistics, "config": settings, "shards": entries}


def _sums(activations: Float[Tensor, "tokens n_models d_model"]) -> dict[str, Any]:
    """Return sums in float64, added over shards at the end: running means in bfloat16 stop moving after 256 tokens.

    Norms and sums of BLOCK tokens are float32, so that no copy of the shard in float64 is made.
    """
    n_tokens, n_models, d_model = activations.shape
    total = torch.zeros(n_models * d_model, dtype=torch.float64)
    norms = torch.empty(n_tokens, n_models, dtype=torch.float64)
    for part, of_part in zip(activations.split(BLOCK), norms.split(BLOCK), strict=True):
        x = part.float()
        of_part.copy_(torch.linalg.vector_norm(x, dim=-1))
        total += x.new_ones(len(x)) @ x.flatten(1)
    sums = total.view(n_models, d_model)
    return {
        "sum": sums.tolist(),
        "norm_sum": norms.sum(dim=0).tolist(),
        "square_sum": (norms**2).sum(dim=0).tolist(),
        "norm_max": norms.amax(dim=0).tolist(),
        **outlier_sums(activations, norms, sums / n_tokens),
    }
