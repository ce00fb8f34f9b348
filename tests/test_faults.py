"""What happens to a command from outside, or stands where something else was meant, is one line; nothing is lost."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pair

from crosscoders import ActivationCache, CorruptData, InputError, cache_activations
from crosscoders import cli as crosscoders_cli
from crosscoders.common import command_line, files, results
from crosscoders.common.command_line import Command, main
from crosscoders.common.folders import RemoteFolder
from crosscoders.common.progress import say
from crosscoders.training.checkpoint import start_run
from diffing.latents.records import require_one_table


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a command that fails."""

    out: str = "out"
    """Folder."""


def failing(error: Exception) -> Callable[[Settings], dict[str, object]]:
    def run(settings: Settings) -> dict[str, object]:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_memory_that_runs_out_is_one_line_of_status_3(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "_run_of_test", failing(error), raising=False)
    command = Command("go", "Go.", Settings, "crosscoders.common.command_line:_run_of_test")
    assert main("x", "X.", [command], ["go"]) == 3
    assert capsys.readouterr().err.startswith("error: out of memory (")


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--out", ""], "--out is empty"),
        (["--out", "s3://bucket/run"], "--out 's3://bucket/run' is a URL; go writes to a local folder"),
        (["--out", "\udcff"], r"'\udcff' is not UTF-8 text"),
    ],
)
def test_an_out_that_is_no_local_folder_is_refused(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("go", "Go.", Settings, "nowhere:run")
    assert main("x", "X.", [command], ["go", *argv]) == 2
    assert line in capsys.readouterr().err


def test_empty_data_is_not_the_current_folder(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--hook-point", "blocks.1.hook_resid_post"]
    assert crosscoders_cli.main([*words, "--data", "", "--out", str(tmp_path / "c")]) == 2
    assert "data is an empty list; name at least one file" in capsys.readouterr().err


def test_an_infinite_rate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("lr: .inf")
    words = ["train", "--config", str(tmp_path / "c.yaml"), "--crosscoder.dict-size", "8", "--crosscoder.k", "2"]
    assert crosscoders_cli.main([*words, "--cache", "nowhere", "--out", str(tmp_path / "r")]) == 2
    assert "lr is inf; give a number above 0" in capsys.readouterr().err


def test_work_goes_on_where_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        say("first")
        say("second")


def test_a_pipe_in_a_data_folder_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copyfile(pair.data, tmp_path / "data" / "a.jsonl")
    os.mkfifo(tmp_path / "data" / "b.jsonl")
    with pytest.raises(InputError, match=r"data/b.jsonl' is a pipe, a device or a link to nothing"):
        cache_activations(pair.config(tmp_path / "c", data=str(tmp_path / "data")))


def test_a_run_is_no_place_for_a_cache_and_a_cache_none_for_a_run(
    pair: Pair, cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a run \(run.json\), no cache"):
        cache_activations(pair.config(tmp_path))
    with pytest.raises(InputError, match=r"holds an activation cache \(manifest.json\)"):
        start_run(cache_folder, Settings(), {}, {})


def test_a_finished_shard_that_is_lost_is_made_again(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(cache_folder, tmp_path / "c"))
    (out / "manifest.json").unlink()
    (out / "shard-00001.safetensors").unlink()
    cache_activations(pair.config(out))
    assert ActivationCache(out).manifest_hash == ActivationCache(cache_folder).manifest_hash


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", "sums-00002.json"])
def test_a_torn_upload_counts_as_absent(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    url = f"file://{tmp_path}/bucket"
    real = RemoteFolder.write_json

    def torn(folder: RemoteFolder, file: str, value: object) -> None:
        real(folder, file, value)
        if file == name:
            path = tmp_path / "bucket" / name
            path.write_bytes(path.read_bytes()[:-30])
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RemoteFolder, "write_json", torn)
        cache_activations(pair.config(url))
    again = cache_activations(pair.config(url))
    assert again.manifest_hash == ActivationCache(cache_folder).manifest_hash


def test_files_of_two_tables_are_not_read_as_one(tmp_path: Path) -> None:
    written = files.write_json(tmp_path / "twins.json", {"twins": [1]})
    described = {"format_version": 1, "files": {"twins.json": written._asdict()}}
    files.write_json(tmp_path / "latents.json", described)
    require_one_table(tmp_path)
    files.write_json(tmp_path / "twins.json", {"twins": [2]})
    with pytest.raises(CorruptData, match=r"twins.json is not the file that latents.json describes. Run diffing scale"):
        require_one_table(tmp_path)


def test_a_result_that_cannot_be_written_is_said_and_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lens.json").mkdir()
    results.publish(tmp_path / "lens.json", {"rows": []})
    assert "The results are printed and nowhere else" in capsys.readouterr().err
