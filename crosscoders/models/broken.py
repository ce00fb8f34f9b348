"""Which file of a model's folder is to blame when transformers or PEFT cannot load it."""

import json
import pickle
from pathlib import Path

from crosscoders.common.errors import CorruptData

_JSON = (
    "config.json", "adapter_config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
)  # fmt: skip


def require_json(name: str) -> None:
    """Raise CorruptData for the first JSON file of a model's folder that is none."""
    for file in _JSON if Path(name).is_dir() else ():
        path = Path(name) / file
        try:
            is_object = not path.is_file() or isinstance(json.loads(path.read_bytes()), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise CorruptData(f"{path} is damaged: it holds no JSON object. Download or copy it again.") from None


def require_tensors(name: str, error: Exception) -> None:
    """Raise CorruptData where a model's pickle was refused, or is none."""
    if isinstance(error, pickle.UnpicklingError | EOFError) and Path(name).is_dir():
        for path in sorted(Path(name).glob("*.bin")):
            raise CorruptData(
                f"{path} is refused: it needs unpickling of more than tensors, or is damaged. Ask for safetensors, or "
                "convert it where it was made."
            ) from None
