"""Settings of `diffing export | push`. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crosscoders.common.errors import InputError

ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
"""An id of Neuronpedia."""


@dataclass(frozen=True)
class ExportSettings:
    """Write a run as others read it; what it holds does not change."""

    run: str
    """Run folder. For Neuronpedia after `diffing scale`; tables are made of whatever it holds."""
    csv: str | None = None
    """Folder for every table of the run as CSV."""
    parquet: str | None = None
    """Folder for every table of the run as Parquet."""
    neuronpedia: str | None = None
    """Folder for features, activations and explanations as Neuronpedia's public exports have them; for each model of
    the pair one source. Loads both models."""
    source_set: str = "crosscoder"
    """Name of the run among others of the same models on Neuronpedia: letters, digits, _ and -."""
    creator: str = "unknown"
    """Whom Neuronpedia names as the creator."""
    cache: str | None = None
    """Folder of `crosscoders cache`, for Neuronpedia. Default: the one that the run was trained on."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Write into folders that hold something."""

    def __post_init__(self) -> None:
        folders = [folder for folder in (self.csv, self.parquet, self.neuronpedia) if folder is not None]
        if not folders:
            raise InputError("nothing to write. Name a folder: --csv, --parquet or --neuronpedia.")
        if not ID.fullmatch(self.source_set):
            raise InputError(f"source_set is {self.source_set!r}; expected letters, digits, _ and -, at most 128.")
        for folder in folders:
            require_empty(folder, self.overwrite)


@dataclass(frozen=True)
class PushSettings:
    """Upload what a run made to the hub, with a model card made from it."""

    run: str
    """A crosscoder's run, or a folder of `sae-lora finetune-sae`, `sae-lora fit` or `diffing topk-lora fit`."""
    repo: str
    """Repository of the hub, OWNER/NAME; made where it is not there."""
    public: bool = False
    """Make the repository for everybody to see."""
    out: str | None = None
    """Write the files into this folder to look at, and upload nothing."""

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise InputError(f"repo is {self.repo!r}; expected OWNER/NAME.")
        if self.out is not None:
            require_empty(self.out, False)


def require_empty(folder: str, overwrite: bool) -> None:
    """Raise InputError where a folder holds something and may not be written into."""
    path = Path(folder)
    if path.is_file():
        raise InputError(f"{folder!r} is a file. Name a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{folder!r} holds something. Name another folder, or say --overwrite.")
