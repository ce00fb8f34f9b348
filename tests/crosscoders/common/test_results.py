"""What a result says of where it was made."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux has /proc")
def test_the_peak_of_memory_is_this_process_s_and_not_that_of_the_one_that_began_it() -> None:
    child = "from crosscoders.common.provenance import peak_memory_gib; print(peak_memory_gib())"
    parent = f"import subprocess, sys; held = b'1' * (1 << 30); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 0.005 < float(done.stdout) < 0.9
