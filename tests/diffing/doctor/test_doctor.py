"""What `diffing doctor` says of a machine, on memories that are made up."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from crosscoders.common import memory
from crosscoders.common.memory import Room
from diffing.cli import main
from diffing.doctor.command import pairs_that_fit

GB = 10**9


def test_a_pair_fits_with_both_models_and_two_gib_beside() -> None:
    assert pairs_that_fit(2 * GB, 4) == []
    assert pairs_that_fit(13 * GB, 2)[-1] == "Gemma 2 2B"  # 2 models x 2.61e9 weights x 2 bytes + 2.1 GB
    assert pairs_that_fit(12 * GB, 2)[-1] == "Llama 3.2 1B"
    assert "Gemma 2 2B" not in pairs_that_fit(13 * GB, 4)


def test_it_says_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: Room(7 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (100 * GB, 70 * GB, 30 * GB))
    assert main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = {row["name"]: row["value"] for row in told["rows"]}
    assert values == {
        "doctor.memory.free": 7 * GB, "doctor.memory.total": 8 * GB,
        "doctor.disk.free": 30 * GB, "doctor.disk.total": 100 * GB,
    }  # fmt: skip
    assert told["pairs"] == ["Gemma 3 270M", "Qwen 2.5 0.5B"]
    assert told["machine"]["hub"].startswith("no token: public models only")
    assert told["machine"]["GPU"].startswith("none that torch")


def test_a_token_of_the_hub_is_seen_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "a token is there" in printed and "hf_secret" not in printed


def test_a_folder_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", "/nowhere"]) == 2
    assert "folder '/nowhere' is not there" in capsys.readouterr().err
