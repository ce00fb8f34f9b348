"""Which layout a local folder or file has, told by the names of its files and its settings alone."""

from pathlib import Path

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.formats.neighbours import neighbour
from sae_lora.dictionaries.frozen import Layout

READ = (
    "What is read: params.npz of Gemma Scope, params.safetensors of Gemma Scope 2, cfg.json with "
    "sae_weights.safetensors of SAELens, names RELEASE/ID of its list, and crosscoders."
)


def layout_of(given: Path) -> Layout:
    """Return the layout of what is there; a folder that nothing tells apart is taken for a crosscoder's.

    Raises:
        InputError: a folder of another toolkit, by its name.
    """
    archive = given / "params.npz" if given.is_dir() else given
    if archive.suffix == ".npz" and archive.is_file():
        return "gemma-scope"
    if given.name == "params.safetensors" or (given / "params.safetensors").is_file():
        return "gemma-scope-2"
    if (given / "cfg.json").is_file():
        # SAELens wrote no architecture at first.
        has_weights = (given / "sae_weights.safetensors").is_file()
        if has_weights or "architecture" in files.read_model(given / "cfg.json", Record):
            return "sae-lens"
    what = neighbour(given)
    if what is not None:
        raise InputError(f"{str(given)!r} is {what}. {READ}")
    return "crosscoder"
