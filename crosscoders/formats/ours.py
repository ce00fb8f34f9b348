"""Our own layout: config.json with our format name, and model.safetensors."""

from pathlib import Path
from typing import Any, Literal

from crosscoders.common import files
from crosscoders.common.errors import CorruptData
from crosscoders.common.records import FileRecord, Named, Record
from crosscoders.dictionary.crosscoder import FORMAT_VERSION, Crosscoder
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.weights import _filled

FORMAT = "model-diffing/crosscoder"


class TrainedOn(Record):
    """The activations that a crosscoder was trained on."""

    hook_point: str | None = None
    base: Named | None = None
    tuned: Named | None = None


class Provenance(Record):
    """Where a crosscoder comes from."""

    cache: TrainedOn = TrainedOn()


class CrosscoderRecord(Record):
    """config.json of a crosscoder."""

    version = FORMAT_VERSION
    again = "save the crosscoder again"
    format: Literal["model-diffing/crosscoder"]
    format_version: int
    crosscoder: CrosscoderConfig
    weights: FileRecord
    provenance: Provenance = Provenance()


def _read_ours(path: Path) -> Crosscoder:
    config = files.read_model(path, CrosscoderRecord)
    try:
        model = Crosscoder(CrosscoderConfig(**config["crosscoder"]))
    except TypeError as error:  # a setting of a later version, which may mean another function
        raise CorruptData(f"{path} has an unknown entry: {error}. Save the crosscoder again.") from None
    expected = files.Written(config["weights"]["n_bytes"], config["weights"]["checksum"])
    return _filled(model, files.read_tensors(path.parent / "model.safetensors", expected), path)


def trained_on(folder: Path) -> dict[str, Any]:
    """Return what one of our crosscoders records of the activations that it was trained on: `hook_point`, `base`,
    `tuned` and more; empty where nothing is recorded, or the layout is of others.

    Raises:
        CorruptData: its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file() or files.read_model(path, Record).get("format") != FORMAT:
        return {}
    return dict(files.read_model(path, CrosscoderRecord).get("provenance", {}).get("cache", {}))
