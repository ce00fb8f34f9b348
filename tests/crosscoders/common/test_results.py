"""What a result says of where it was made."""

import importlib.metadata

import pytest
import torch

from crosscoders.common.provenance import environment
from crosscoders.common.results import result


@pytest.mark.parametrize(
    "config, device",
    [
        ({"device": "auto"}, "a GPU"),
        ({"device": "cuda:1"}, "a GPU"),
        ({"devices": "cuda:1, cuda:0", "device": "auto"}, "a GPU"),
        ({"devices": None, "device": "cpu"}, "cpu"),
        ({}, "cpu"),
    ],
)
def test_a_result_names_the_device_that_its_settings_mean(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, object], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert result("train", config, [])["environment"]["device"] == device


def test_provenance_has_the_versions_of_the_packages_that_split_text_and_apply_adapters() -> None:
    facts = environment()
    assert {name: facts[name] for name in ("peft", "tokenizers")} == {
        name: importlib.metadata.version(name) for name in ("peft", "tokenizers")
    }
