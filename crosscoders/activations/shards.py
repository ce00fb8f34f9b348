"""Shards and manifest of one cache, or of one part of it: what is there, what is missing, what is published last.

    progress.json   while it is written: the plan
    sums-*.json     while it is written, and in a part: each finished shard with its sums
    part.json       of a finished part: the plan with `part` and its shards, for `merge_parts`
    manifest.json   of a finished cache: sums made into statistics

`ShardWriter` holds one folder; `build_manifest` makes the manifest of a cache and is the same for one run and for
merged parts.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from crosscoders.activations.outliers import outlier_statistics, within
from crosscoders.activations.plan import FORMAT_VERSION, Plan
from crosscoders.activations.scored import DTYPES, Tokens
from crosscoders.activations.settings import CacheConfig, Part
from crosscoders.activations.sums import Shard, is_sums, read_sums, shard_sums, sums_name, write_sums
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.folders import Folder, RemoteFolder
from crosscoders.common.progress import say
from crosscoders.common.records import Named, Record
from crosscoders.models.names import identity

COLUMN_BYTES = 17
"""Of one token, beside its activations."""
SUMS = ("sum", "norm_sum", "square_sum")


def bytes_per_token(config: CacheConfig, d_model: int) -> int:
    """Return the bytes of a token on disk, at one hook point."""
    return 2 * DTYPES[config.dtype].itemsize * d_model + COLUMN_BYTES


class ProgressRecord(Record):
    """progress.json; the plan in it is compared with the present one, key by key."""

    format_version: int


class PartRecord(Record):
    """part.json"""

    part: str
    config: dict[str, Any]
    n_tokens: int = Field(gt=0)
    shard_tokens: int = Field(gt=0)
    n_models: int = Field(gt=0)
    d_model: int = Field(gt=0)
    shards: list[Shard] = Field(min_length=1)


Norm = Annotated[float, Field(gt=0)]
SLACK = 1.001
"""Norms are summed in float32, and rounded."""


class Statistics(Record):
    """Over all tokens of a cache, for each model."""

    n_tokens: int = Field(gt=0)
    mean: list[list[float]]
    mean_norm: list[Norm]
    mean_squared_norm: list[Norm]
    left_out_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> "Statistics":
        for mean, norm, square in zip(self.mean, self.mean_norm, self.mean_squared_norm, strict=False):
            if not math.hypot(*mean) / SLACK <= norm <= math.sqrt(square) * SLACK:
                raise ValueError("mean, mean_norm and mean_squared_norm are not those of any activations")
        return self


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
    n_models: int = Field(gt=0)
    d_model: int = Field(gt=0)
    dtype: Literal["bfloat16", "float32"]
    n_tokens: int = Field(gt=0)
    drop_bos: bool
    groups: list[str]
    counts: dict[str, int]
    statistics: Statistics
    config: CacheConfig
    shards: list[Shard] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        n_tokens, statistics = sum(shard.n_tokens for shard in self.shards), self.statistics
        if n_tokens != statistics.n_tokens or n_tokens + statistics.left_out_tokens != self.n_tokens:
            raise ValueError(f"n_tokens is {self.n_tokens} but its shards have {n_tokens}")
        if [shard.name for shard in self.shards] != [shard_name(number) for number in range(len(self.shards))]:
            raise ValueError("its shards are not each there once and in order")
        per_model = (statistics.mean, statistics.mean_norm, statistics.mean_squared_norm)
        widths = [len(mean) for mean in statistics.mean]
        if widths != [self.d_model] * self.n_models or {len(values) for values in per_model} != {self.n_models}:
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
        if "run.json" in there:
            raise InputError(f"{self.folder} holds a run (run.json), no cache. Choose another --out.")
        wanted = self._identity()
        for name, model in RECORDS.items():
            if name in there and not self._is_torn(name, there):
                recorded = self.folder.read_model(name, model)
                key = first_difference(recorded, wanted)
                if key:
                    raise InputError(
                        f"{self.folder} holds a cache with another {key} ({recorded.get(key)!r}, now {wanted[key]!r}). "
                        "Choose another --out, or remove that folder."
                    )
                self.is_complete = name in FINAL
                self.shards = list(recorded["shards"]) if self.is_complete else self._finished(there)
                return
        for name in filter(is_sums, there):
            self.folder.remove(name)  # of a run whose progress.json is gone

    def _is_torn(self, name: str, there: dict[str, int]) -> bool:
        """Return whether an upload of a file was cut off, which then counts as not there: behind a URL no file is put
        in its place as a whole. A manifest that is damaged later has no progress.json beside it."""
        if not isinstance(self.folder, RemoteFolder) or (name in FINAL and "progress.json" not in there):
            return False
        try:
            self.folder.read_model(name, Record)
        except CorruptData:
            say(f"{self.folder}/{name} was cut off and is written again")
            return True
        return False

    def _finished(self, there: dict[str, int]) -> list[dict[str, Any]]:
        """Read the sums of shards up to the first one that is missing or cut."""
        shards: list[dict[str, Any]] = []
        for name in map(shard_name, self.numbers):
            if sums_name(name) not in there:
                break
            if self._is_torn(sums_name(name), there):
                break
            shard = read_sums(self.folder, name, (self.plan.shared["n_models"], self.plan.shared["d_model"]))
            if there.get(name) != shard["n_bytes"]:
                break
            shards.append(shard)
        return shards

    def _identity(self) -> dict[str, Any]:
        return {**self.plan.fingerprint(self.hook_point), "part": str(self.part) if self.part else None}

    @property
    def next_shard(self) -> int:
        return self.numbers.start + len(self.shards)

    def write(self, number: int, tokens: Tokens) -> None:
        """Publish the next shard, and its sums after it."""
        name, n_planned = shard_name(number), len(tokens.token_ids)
        tokens = within(tokens, self.config.max_norm_multiple)
        counts = {"n_tokens": len(tokens.token_ids), "left_out": n_planned - len(tokens.token_ids)}
        with ThreadPoolExecutor(1) as beside:  # sums take about as long as the write, and neither holds the interpreter
            sums = beside.submit(shard_sums, tokens.activations)
            written = self.folder.write_tensors(name, tokens._asdict())
        if not self.shards:
            self.folder.write_json("progress.json", self._progress())
        self.shards.append({"name": name, **counts, **written._asdict(), **sums.result()})
        write_sums(self.folder, self.shards[-1])

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
            whole = {**header, "part": str(self.part), "config": settings, "shards": _entries(self.shards)}
            self.folder.write_json("part.json", whole)
        else:
            self.folder.write_json("manifest.json", build_manifest(header, settings, self.shards))
        self.folder.remove("progress.json")
        if not self.part:
            for shard in self.shards:
                self.folder.remove(sums_name(shard["name"]))


def _entries(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what identifies each shard, without its sums."""
    return [{key: shard[key] for key in ("name", "n_tokens", "n_bytes", "checksum")} for shard in shards]


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
    return {**header, "statistics": statistics, "config": settings, "shards": _entries(shards)}
