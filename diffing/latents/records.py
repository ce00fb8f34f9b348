"""What `diffing scale` writes: forms of latents.json and twins.json, and whether the files of a table are of one."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from crosscoders.common import files
from crosscoders.common.errors import CorruptData
from crosscoders.common.records import FileRecord, Record

FORMAT_VERSION = 1


class Twin(Record):
    """A pair of twins, or of the control."""

    tuned: int
    base: int
    cosine: float
    divergence: float


class TwinRecord(Record):
    """twins.json"""

    version = FORMAT_VERSION
    again = "run diffing scale again"
    format_version: int
    twins: list[Twin]
    control: list[Twin]


class CacheOf(Record):
    """The cache that a table was made on."""

    path: str
    hash: str


class Columns(Record):
    """Columns of the latent table, by name, of equal length; more than these."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[Any]]
    latent: list[int]
    verdict: list[str]

    @model_validator(mode="after")
    def _agrees(self) -> "Columns":
        for name, values in [("verdict", self.verdict), *self.__pydantic_extra__.items()]:
            if len(values) != len(self.latent):
                raise ValueError(f"{name!r} has {len(values)} entries, 'latent' has {len(self.latent)}")
        return self


class LatentRecord(Record):
    """latents.json"""

    version = FORMAT_VERSION
    again = "run diffing scale again"
    format_version: int
    n_tokens: int
    n_blocks: int
    cache: CacheOf
    thresholds: dict[str, float]
    columns: Columns


class FilesBeside(Record):
    """latents.json, the files that it was written with; tables of earlier versions name none."""

    version = FORMAT_VERSION
    again = "run diffing scale again"
    format_version: int
    files: dict[str, FileRecord] = Field(default_factory=dict)


def require_one_table(run: Path) -> None:
    """Compare the files beside RUN/latents.json with those that it was written with.

    Raises:
        CorruptData: one is of another table, as an interrupted `diffing scale` leaves it, or damaged.
    """
    for name, expected in files.read_model(run / "latents.json", FilesBeside).get("files", {}).items():
        path = run / name
        if path.is_file() and files.written(path)._asdict() != expected:
            raise CorruptData(f"{path} is not the file that latents.json describes. Run diffing scale again.")
