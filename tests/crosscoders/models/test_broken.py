"""A damaged file in a model's folder is named in one line."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair

from crosscoders import CorruptData, InputError
from crosscoders.models.adapters import require_adapter
from crosscoders.models.loading import load_model
from crosscoders.models.names import load_auto


class Touch:
    """What unpickling would run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def model(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.tuned, tmp_path / "model"))


@pytest.mark.parametrize(
    "file, what",
    [("config.json", "config"), ("tokenizer.json", "tokenizer"), ("tokenizer_config.json", "tokenizer")],
)
def test_a_cut_json_file_is_named(model: Path, file: str, what: str) -> None:
    path = model / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptData, match=f"model/{file} is damaged: it holds no JSON object"):
        load_auto(str(model), what)


@pytest.mark.parametrize("old, new", [('"gemma2"', '"gemmb2"'), ('"hidden_size": 16', '"hidden_size": "x"')])
def test_a_wrong_value_in_a_configuration_names_the_model(model: Path, old: str, new: str) -> None:
    path = model / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=r"model '.*/model'"):
        load_auto(str(model), "config")


def test_a_wrong_value_in_a_tokenizer_names_the_model(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"BPF"'))
    with pytest.raises(InputError, match=r"no tokenizer for model '.*/model'"):
        load_auto(str(model), "tokenizer")


def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "canary"), 2))
    with pytest.raises(CorruptData, match=r"pytorch_model.bin is refused: it needs unpickling of more than tensors"):
        load_model(str(model), torch.float32)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("data", [b'{"peft_type": "LO', b"[1]"])
def test_a_damaged_configuration_of_an_adapter_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(CorruptData, match=r"adapter_config.json is damaged: it holds no JSON object"):
        require_adapter(str(tmp_path), "base")
