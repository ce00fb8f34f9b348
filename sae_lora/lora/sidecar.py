"""The sidecar `splice.json` of an adapter folder, which names the dictionaries that it was fitted around."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.hub import repository_folder
from crosscoders.common.records import FileRecord, Named, Record
from sae_lora.dictionaries.frozen import FrozenDictionary, Side
from sae_lora.dictionaries.settings import ControlKind

FORMAT = "model-diffing/sae-lora"


FORMAT_VERSION = 1


SIDECAR = "splice.json"


CORRECTOR_WEIGHTS = "corrector.safetensors"


PEFT_CONFIG = "adapter_config.json"


class ControlOf(Record):
    """What a control was made from."""

    kind: ControlKind
    seed: int
    source_hash: str


class DictionaryEntry(Record):
    """One of the dictionaries that were spliced in."""

    hash: str
    path: str
    hook_point: str
    side: Side | None
    control: ControlOf | None


class Tokens(Record):
    """What was fitted on."""

    hash: str
    n: int


class Kept(Record):
    """Positions that no dictionary replaces."""

    token_ids: list[int]


class SidecarRecord(Record):
    """splice.json"""

    version = FORMAT_VERSION
    again = "fit again"
    format: Literal["model-diffing/sae-lora"]
    format_version: int
    model: Named
    tokens: Tokens
    corrector: Literal["lora", "mean-scale", "affine", "sae"]
    layers: list[int] | None = None
    rank: int | None = None
    kept_positions: Kept
    dictionaries: list[DictionaryEntry] = Field(min_length=1)
    foreign_dictionary: bool
    other_model: Named | None = None
    weights: FileRecord
    peft_config: FileRecord | None = None
    """Of adapter_config.json, where there is one."""

    @model_validator(mode="after")
    def _agrees(self) -> "SidecarRecord":
        if self.corrector == "lora" and (self.rank is None or not self.layers):
            raise ValueError("LoRA has a rank and layers")
        return self


def weights_file(corrector: str) -> str:
    """Return the name of the file with the weights that were trained."""
    return "adapter_model.safetensors" if corrector == "lora" else CORRECTOR_WEIGHTS


def write_sidecar(
    folder: Path, dictionaries: Sequence[FrozenDictionary], keep_ids: Sequence[int], described: dict[str, Any]
) -> None:
    """Describe the weights in a folder. `described`: what else is recorded (model, tokens, corrector, layers)."""
    sidecar = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **described,
        "mode": "replace",
        "kept_positions": {"padding": True, "token_ids": list(keep_ids)},
        "dictionaries": [dictionary.identity() for dictionary in dictionaries],
        "weights": files.written(folder / weights_file(described["corrector"]))._asdict(),
    }
    if (folder / PEFT_CONFIG).is_file():
        sidecar["peft_config"] = files.written(folder / PEFT_CONFIG)._asdict()
    files.write_json(folder / SIDECAR, sidecar)


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """Read the sidecar of an adapter folder, of the `adapter` in a run folder, or of a repository of the hub, with
    `folder` added.

    Raises:
        InputError: no adapter, or one without a sidecar, or of another version.
        CorruptData: the adapter's weights are not those that were saved.
    """
    path = repository_folder(folder)
    path = path / "adapter" if (path / "adapter").is_dir() else path
    if not (path / PEFT_CONFIG).is_file() and not (path / SIDECAR).is_file():
        raise InputError(f"{path} holds no adapter: there is no {SIDECAR}. Give a run of `sae-lora fit`.")
    if not (path / SIDECAR).is_file():
        raise InputError(
            f"{path} is an adapter without {SIDECAR}, which names the dictionary that it was fitted around. Copy the "
            "whole folder of `sae-lora fit`, or load it with plain PEFT if it is none."
        )
    sidecar = files.read_model(path / SIDECAR, SidecarRecord)
    described = {weights_file(sidecar["corrector"]): sidecar["weights"], PEFT_CONFIG: sidecar.get("peft_config")}
    for name, expected in described.items():
        file = path / name
        if expected and (not file.is_file() or files.written(file)._asdict() != expected):
            raise CorruptData(f"{file} is not the file that {SIDECAR} describes. Copy or fit it again.")
    return {**sidecar, "folder": str(path)}


def require_same_dictionaries(sidecar: dict[str, Any], dictionaries: Sequence[FrozenDictionary]) -> None:
    """Raise InputError unless these are the dictionaries, at the hook points, that the adapter was fitted around."""
    by_point = {dictionary.hook_point: dictionary for dictionary in dictionaries}
    for entry in sidecar["dictionaries"]:
        point = entry["hook_point"]
        if point not in by_point:
            raise InputError(f"the adapter {sidecar['folder']!r} needs a dictionary at {point!r}; none was given.")
        content = by_point.pop(point).content_hash()
        if content != entry["hash"]:
            raise InputError(
                f"the dictionary at {point!r} has hash {content[:12]} but the adapter {sidecar['folder']!r} was fitted "
                f"around {entry['hash'][:12]} ({entry['path']}). Give that one."
            )
    if by_point:
        raise InputError(
            f"the adapter {sidecar['folder']!r} knows no dictionary at {next(iter(by_point))!r}. Leave it out."
        )
