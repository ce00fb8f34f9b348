"""A decomposition on disk: pieces and importance networks, what they were made from, never a weight.

    RUN/decomposition.json           sites, settings, hashes of the models; written last
    RUN/decomposition.safetensors    site/<name>/V (d_in, components), site/<name>/U (components, d_out),
                                     network/<name>/<parameter>

V and U are in the units and the spaces of the site's map, so another program can use them as they are.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.records import FileRecord, Record
from diffing.decomposition.model import Decomposition
from diffing.decomposition.settings import DecompositionConfig

DESCRIPTION, TENSORS = "decomposition.json", "decomposition.safetensors"
FORMAT, FORMAT_VERSION = "decomposition", 1


class DecompositionRecord(Record):
    """decomposition.json"""

    version = FORMAT_VERSION
    again = "decompose again"
    format: str
    format_version: int
    sites: list[str]
    config: dict[str, Any]
    inputs: dict[str, Any]
    tensors: FileRecord


def save(decomposition: Decomposition, folder: Path, config: DecompositionConfig, inputs: dict[str, Any]) -> None:
    """Write both files; inputs: what it was made from, as plain data."""
    tensors: dict[str, Tensor] = {}
    for (name, site), network in zip(decomposition.sites.items(), decomposition.networks, strict=True):
        V, U = site.pieces()
        tensors |= {f"site/{name}/V": V, f"site/{name}/U": U}
        tensors |= {f"network/{name}/{part}": weight for part, weight in network.state_dict().items()}
    written = files.write_tensors(folder / TENSORS, tensors)
    record = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "sites": decomposition.names, "config": to_dict(config),
        "inputs": inputs, "tensors": written._asdict(),
    }  # fmt: skip
    files.write_json(folder / DESCRIPTION, record)


def read_description(folder: Path) -> tuple[DecompositionConfig, dict[str, Any]]:
    """Return the settings and the inputs of a saved decomposition.

    Raises:
        InputError: there is none, or one of another version.
        CorruptData: it is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} holds no decomposition: there is no {DESCRIPTION}. Run diffing decompose first.")
    record = files.read_model(folder / DESCRIPTION, DecompositionRecord)
    known = {field.name for field in fields(DecompositionConfig)}
    return DecompositionConfig(**{k: v for k, v in record["config"].items() if k in known}), record["inputs"]


def load_(decomposition: Decomposition, folder: Path) -> None:
    """Give a fresh decomposition of the same sites the pieces and networks that were saved.

    Raises:
        InputError: it has other sites.
        CorruptData: a tensor is missing or has another shape.
    """
    record = files.read_model(folder / DESCRIPTION, DecompositionRecord)
    if record["sites"] != decomposition.names:
        raise InputError(f"{folder} has the sites {record['sites']}, the model {decomposition.names}. Name the same.")
    tensors = files.read_tensors(folder / TENSORS, files.Written(**record["tensors"]))
    try:
        for (name, site), network in zip(decomposition.sites.items(), decomposition.networks, strict=True):
            site.set_pieces(tensors[f"site/{name}/V"], tensors[f"site/{name}/U"])
            of_network = f"network/{name}/"
            network.load_state_dict(
                {k.removeprefix(of_network): t for k, t in tensors.items() if k.startswith(of_network)}
            )
    except (KeyError, RuntimeError) as error:
        raise CorruptData(f"{folder / TENSORS} does not fit its models ({error}). Decompose again.") from None
