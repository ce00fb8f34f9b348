"""Our own layout: config.json with our format name, and model.safetensors."""

from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.dictionary.crosscoder import FORMAT_VERSION, Crosscoder
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.weights import _filled


def _read_ours(config: dict[str, Any], path: Path) -> Crosscoder:
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {config.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    try:
        model = Crosscoder(CrosscoderConfig(**config["crosscoder"]))
        expected = files.Written(**config["weights"])
    except (KeyError, TypeError) as error:
        raise CorruptData(f"{path} lacks or has an unknown entry: {error}. Save the crosscoder again.") from None
    return _filled(model, files.read_tensors(path.parent / "model.safetensors", expected), path)
