"""Sums over the tokens of each shard, in a small file beside it until the cache is published.

`write_sums` writes sums-00000.json for shard-00000.safetensors and `read_sums` reads it back, bit for bit. No file
holds the sums of more than one shard, so that what is written grows with the number of shards, not with its square.
"""

import base64
import binascii
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from crosscoders.activations.outliers import outlier_sums
from crosscoders.common.errors import CorruptData
from crosscoders.common.folders import Folder
from crosscoders.common.records import FileRecord

BLOCK = 512
"""Tokens that are summed in float32."""
STORED = "<f8"


class Shard(FileRecord):
    """A finished shard, in a manifest."""

    name: str
    n_tokens: int = Field(gt=0)


IfThere = Annotated[list[float], Field(default_factory=list)]
"""A number of each model, which shards of earlier versions lack."""


class SummedShard(Shard):
    """sums-00000.json: a shard before the sums are made into statistics."""

    again = "remove it: its shard is then cached again"
    sum: str
    norm_sum: list[float] = Field(min_length=1)
    square_sum: list[float]
    norm_max: list[float]
    norm_median_sum: IfThere
    spread: IfThere
    top_tokens: IfThere
    top_spread: IfThere
    outlying_tokens: IfThere
    outlying_spread: IfThere
    left_out: int = 0

    @model_validator(mode="after")
    def _agrees(self) -> "SummedShard":
        values = [getattr(self, name) for name in self.model_fields_set]
        if len({len(value) for value in values if isinstance(value, list)}) != 1:
            raise ValueError("its sums are of different lengths")
        try:
            is_finite = np.isfinite(unpacked(self.sum, len(self.norm_sum))).all()
        except (ValueError, binascii.Error):
            raise ValueError("sum is no array of float64 in base64, a row of each model") from None
        if not is_finite:
            raise ValueError("sum is not finite")
        return self


def shard_sums(activations: Float[Tensor, "tokens n_models d_model"]) -> dict[str, Any]:
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
        "sum": sums.numpy(),
        "norm_sum": norms.sum(dim=0).tolist(),
        "square_sum": (norms**2).sum(dim=0).tolist(),
        "norm_max": norms.amax(dim=0).tolist(),
        **outlier_sums(activations, norms, sums / n_tokens),
    }


def packed(array: Float[np.ndarray, "n_models d_model"]) -> str:
    """Return an array as base64 of its float64 values, 10.7 characters each where decimals take 19."""
    return base64.b64encode(array.astype(STORED).tobytes()).decode()


def unpacked(text: str, n_models: int) -> Float[np.ndarray, "n_models d_model"]:
    """Return the array that `packed` has made into text."""
    return np.frombuffer(base64.b64decode(text, validate=True), STORED).reshape(n_models, -1)


def sums_name(shard: str) -> str:
    """Return the name of the file with the sums of a shard of that name."""
    return shard.replace("shard-", "sums-").replace(".safetensors", ".json")


def is_sums(name: str) -> bool:
    """Return whether a file of that name holds the sums of a shard."""
    return name.startswith("sums-") and name.endswith(".json")


def write_sums(folder: Folder, shard: dict[str, Any]) -> None:
    """Write a finished shard with its sums."""
    folder.write_json(sums_name(shard["name"]), shard | {"sum": packed(shard["sum"])})


def read_sums(folder: Folder, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Return a finished shard with its sums; `shape` is (n_models, d_model) of its cache.

    Raises:
        CorruptData: the file is damaged, or belongs to another shard or cache.
    """
    shard = folder.read_model(sums_name(name), SummedShard)
    shard["sum"] = unpacked(shard["sum"], len(shard["norm_sum"]))
    if shard["name"] != name or shard["sum"].shape != shape:
        raise CorruptData(
            f"{folder}/{sums_name(name)} has the sums of {shard['name']} in shape {shard['sum'].shape}, not of {name} "
            f"in shape {shape}. Restore it, or {SummedShard.again}."
        )
    return shard
