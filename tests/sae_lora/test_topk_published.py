"""The published layout of TopKLoRA, written by hand, loads to what a hand computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crosscoders import CorruptData, InputError
from sae_lora.lora.published import read_circuits, read_published, write_published
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.q_proj.weight)


class Model(nn.Module):
    """The names of a decoder, one linear map in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(), Layer()])
        self.config: Any = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A rank-3 adapter with k 2 on layer 1, alpha 6: a scale of 2."""
    name = "base_model.model.model.layers.1.q_proj"
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    config = {"r": 3, "alpha": 6, "k": 2, "k_final": 2, "alpha_over_r": True, "use_topk": True, "relu_latents": True}
    (tmp_path / "topk_config.json").write_text(json.dumps(config))
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    path = folder / "topk_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def output(model: Any, layer: int, x: list[float]) -> list[float]:
    return model.model.layers[layer].q_proj(torch.tensor([[x]]))[0, 0].tolist()


def test_a_folder_written_by_hand_gives_what_a_hand_computes(folder: Path) -> None:
    model = Model()
    read_published(model, folder)
    # z = (1, 2, 3): the two largest are 2 and 3; B a = (3, 2 - 3); y = (1, 2) + 2 (3, -1)
    assert output(model, 1, [1.0, 2.0]) == [7.0, 0.0]
    # z = (-1, -2, -3): none is positive
    assert output(model, 1, [-1.0, -2.0]) == [-1.0, -2.0]
    assert output(model, 0, [1.0, 2.0]) == [1.0, 2.0]


def test_the_scale_and_the_gate_are_those_of_the_file(folder: Path) -> None:
    change(folder, alpha_over_r=False)  # alpha / k = 3
    model = Model()
    read_published(model, folder).detach()
    read_published(model, folder)
    assert output(model, 1, [1.0, 2.0]) == [10.0, -1.0]
    change(folder, alpha_over_r=True, dense_baseline=True)  # all of z = (1, 2, 3): B z = (4, -1)
    model = Model()
    read_published(model, folder)
    assert output(model, 1, [1.0, 2.0]) == [9.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha_over_r": False, "k": 3}, "alpha_over_r false with k 3 and k_final 2"),
        ({"relu_latents": False}, "relu_latents false"),
        ({"topk_mode": "seqtopk"}, "topk_mode 'seqtopk'"),
    ],
)
def test_what_is_not_certain_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    change(folder, **changes)
    model = Model()
    with pytest.raises(InputError, match=words):
        read_published(model, folder)
    assert output(model, 1, [1.0, 2.0]) == [1.0, 2.0]


def test_other_folders_and_other_models_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no topk_config.json"):
        read_published(Model(), tmp_path / "..")
    small = Model()
    small.model.layers = nn.ModuleList([Layer()])
    with pytest.raises(InputError, match="layer 1 is not there"):
        read_published(small, folder)
    change(folder, r=4)
    with pytest.raises(CorruptData, match="other shapes"):
        read_published(Model(), folder)


def test_ours_written_in_that_layout_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    adapter = TopKLoRA.attach(model, TopKLoRAConfig(rank=4, k=2, layers=[0]))
    for site in adapter.sites.values():
        nn.init.normal_(site.W_out, generator=torch.Generator().manual_seed(0))
    write_published(adapter, tmp_path, base="base")
    assert "warning: plain PEFT takes" in capsys.readouterr().err
    again = Model()
    read_published(again, tmp_path)
    assert output(again, 0, [0.3, -0.2]) == output(model, 0, [0.3, -0.2]) != [0.3, -0.2]


def test_circuits_are_read(folder: Path) -> None:
    with pytest.raises(InputError, match="holds no circuits"):
        read_circuits(folder)
    (folder / "circuits").mkdir()
    (folder / "circuits" / "prefix.json").write_text(
        json.dumps({"kept_latents": [["layers.1.q_proj", 2]], "both_K": 1})
    )
    assert read_circuits(folder) == {"prefix": [["layers.1.q_proj", 2]]}
    (folder / "circuits" / "prefix.json").write_text("[]")
    with pytest.raises(CorruptData, match="kept_latents"):
        read_circuits(folder)
