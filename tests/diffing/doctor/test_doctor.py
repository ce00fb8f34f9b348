"""What `diffing doctor` says of a machine, on memories that are made up."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crosscoders.common.room import Room
from diffing.cli import main
from diffing.doctor import command
from diffing.doctor.command import pairs_that_fit

GB = 10**9


def test_a_pair_fits_with_both_models_and_two_gib_beside() -> None:
    assert pairs_that_fit(2 * GB, 4) == []
    assert pairs_that_fit(13 * GB, 2)[-1] == "Gemma 2 2B"  # 2 models x 2.61e9 weights x 2 bytes + 2.1 GB
    assert pairs_that_fit(12 * GB, 2)[-1] == "Llama 3.2 1B"
    assert "Gemma 2 2B" not in pairs_that_fit(13 * GB, 4)


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """The only program that can be found is an nvidia-smi that says this."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_it_says_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ram_room", lambda: Room(7 * GB, 8 * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (100 * GB, 70 * GB, 30 * GB))
    fake_smi(tmp_path, monkeypatch, "exit 9")
    assert main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = {row["name"]: row["value"] for row in told["rows"]}
    assert values == {
        "doctor.memory.free": 7 * GB, "doctor.memory.total": 8 * GB,
        "doctor.disk.free": 30 * GB, "doctor.disk.total": 100 * GB,
    }  # fmt: skip
    assert told["pairs"] == ["Gemma 3 270M", "Qwen 2.5 0.5B"]
    assert told["machine"]["GPU"].startswith("none that nvidia-smi lists")


def test_gpus_are_those_of_nvidia_smi_and_pairs_fit_the_one_with_most_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo 'NVIDIA A, B, 100, 8192'; echo 'NVIDIA H100, 81000, 81559'")
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = {row["name"]: row["value"] for row in told["rows"]}
    assert (values["doctor.memory_on_cuda:0.free"], values["doctor.memory_on_cuda:1.total"]) == (100 << 20, 81559 << 20)
    assert told["machine"]["GPU"].startswith("NVIDIA A, B, NVIDIA H100")
    assert told["pairs"][-1] == "Gemma 2 9B"  # 2 x 9.24e9 x 2 bytes + 2.1 GB of 84.9 GB


@pytest.mark.parametrize(
    "flags, said",
    [
        ("avx2 avx512f avx512bw avx512vl avx512_bf16", "AVX512, bfloat16"),
        ("avx2 fma", "AVX2, bfloat16 only emulated"),
        ("sse", "no AVX2, bfloat16 only emulated"),
    ],
)
def test_the_instruction_set_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, said: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : A\nflags : {flags}\n")
    monkeypatch.setattr(command, "Path", lambda name: tmp_path / Path(name).name)
    assert command.instructions() == said


def test_a_token_of_the_hub_is_seen_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "a token is there" in printed and "hf_secret" not in printed


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'pandas', 'huggingface_hub.hf_api'}"
    code = f"import sys; from diffing.cli import main; main(['doctor']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", "/nowhere"]) == 2
    assert "folder '/nowhere' is not there" in capsys.readouterr().err
