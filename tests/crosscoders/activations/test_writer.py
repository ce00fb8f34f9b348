"""The writer's thread: its failures arrive, nothing hangs, nothing whole is lost; rates and stop requests."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from caches import file_bytes
from conftest import Pair

from crosscoders import EnvironmentFault, run_cache
from crosscoders import cli as crosscoders_cli
from crosscoders.activations import writer
from crosscoders.activations.scored import Tokens
from crosscoders.activations.shards import Manifest
from crosscoders.common import files
from crosscoders.common.background import Background


def within_a_minute(act: Callable[[], None]) -> BaseException | None:
    """What `act` raises, in a thread of its own, so that a hang fails the test instead of stopping the suite."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    return raised[0] if raised else None


def test_items_are_written_in_order_and_all_of_them() -> None:
    written: list[int] = []
    with Background(written.append, depth=1) as queue:
        for i in range(50):
            queue.put(i)
    assert written == list(range(50)) and queue.wait_seconds > 0


@pytest.mark.parametrize("fails_at", [0, 1, 5, 9])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_failure_of_the_writer_is_raised_at_the_next_put_or_at_the_end(fails_at: int, depth: int) -> None:
    written: list[int] = []
    put: list[int] = []

    def write(i: int) -> None:
        if i == fails_at:
            raise EnvironmentFault(f"planted at {i}")
        written.append(i)

    def produce() -> None:
        with Background(write, depth=depth) as queue:
            for i in range(10):
                queue.put(i)
                put.append(i)

    error = within_a_minute(produce)
    assert isinstance(error, EnvironmentFault) and str(error) == f"planted at {fails_at}"
    assert written == list(range(fails_at)), "what came after the failure is not written"
    assert len(put) <= fails_at + depth + 2 or len(put) == 10


def test_a_failure_of_the_computing_thread_waits_for_what_was_put() -> None:
    written: list[int] = []
    gate = threading.Event()

    def write(i: int) -> None:
        gate.wait(60)
        written.append(i)

    def produce() -> None:
        with Background(write, depth=3) as queue:
            for i in range(3):
                queue.put(i)
            gate.set()
            raise ZeroDivisionError

    assert isinstance(within_a_minute(produce), ZeroDivisionError)
    assert written == [0, 1, 2]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_disk_that_fills_up_at_any_shard_ends_the_run_and_it_goes_on_to_the_same_bytes(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == f"shard-{number:05d}.safetensors":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    error = within_a_minute(lambda: run_cache(pair.config(tmp_path / "cache")) and None)
    assert isinstance(error, EnvironmentFault)
    assert f"no space left for {tmp_path}/cache/shard-{number:05d}.safetensors" in str(error)
    assert len(list((tmp_path / "cache").glob("shard*"))) == number
    monkeypatch.setattr(os, "replace", real)
    run_cache(pair.config(tmp_path / "cache"))
    expected, found = file_bytes(cache_folder), file_bytes(tmp_path / "cache")
    assert {n: b for n, b in found.items() if "shard" in n} == {n: b for n, b in expected.items() if "shard" in n}


def test_forward_passes_are_cut_at_every_shard() -> None:
    def tokens(start: int, stop: int) -> dict[str, Tokens]:
        return {"p": Tokens(*(torch.arange(start, stop) for _ in Tokens._fields))}

    edges = [0, 3, 4, 15, 15, 20, 22]
    passes = [tokens(a, b) for a, b in pairwise(edges)]
    shards = [[piece["p"].token_ids for piece in pieces] for pieces in writer.in_shards(passes, 5)]
    assert [torch.cat(pieces).tolist() for pieces in shards] == [
        list(range(i, min(i + 5, 22))) for i in range(0, 22, 5)
    ]
    assert all(len(piece) for pieces in shards for piece in pieces)


def test_rates_are_said_and_given_as_rows(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_LINES", 0)
    out = tmp_path / "cache"
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600", "--json"]
    argv += ["--hook-point", "blocks.1.hook_resid_post", "--shard-tokens", "128", "--out", str(out)]
    assert crosscoders_cli.main(argv) == 0
    captured = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(captured.out)["rows"]}
    n_bytes = sum(file.stat().st_size for file in out.glob("shard*"))
    seconds = 600 / rows["cache.tokens_per_second"]["value"]
    assert rows["cache.bytes_per_second"]["value"] * seconds == pytest.approx(n_bytes)
    assert 0 < rows["cache.wait_fraction"]["value"] < 1
    assert {rows[f"cache.{name}"]["n"] for name in ("tokens_per_second", "bytes_per_second", "wait_fraction")} == {600}
    lines = [line for line in captured.err.splitlines() if line.startswith("cached ")]
    assert len(lines) > 1 and lines[-1].startswith("cached 600 tokens  ") and "waited for the writer" in lines[-1]
    assert "B/s" in lines[-1] and not [line for line in lines if "  0 B/s" in line]
    assert crosscoders_cli.main(argv) == 0
    assert "cache.tokens_per_second" not in capsys.readouterr().out, "nothing was cached in the second run"


def test_sigterm_keeps_whole_shards_says_so_and_leaves_with_143(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from crosscoders import cli\nfrom crosscoders.activations import source\n"
        "real, passes = source.ActivationSource._start, []\n"
        "def slow(self, *args):\n"
        "    passes.append(0)\n"
        "    if len(passes) == 6: print('ready', flush=True)\n"
        "    while len(passes) == 6: time.sleep(0.05)\n"  # a signal just before one long sleep would not end it
        "    return real(self, *args)\n"
        "source.ActivationSource._start = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600",
            "--hook-point", "blocks.1.hook_resid_post", "--batch-rows=4", "--shard-tokens=128", "--dtype=float32",
            "--out", str(out)]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", script, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143
    assert said.splitlines()[-1] == "error: stopped on request; whole shards are kept. Run the same command to go on."
    assert "Traceback" not in said
    n_kept = len(list(out.glob("sums*")))
    assert 1 <= n_kept < 5 and len(list(out.glob("shard*"))) == n_kept
    run_cache(pair.config(out))
    for name, data in file_bytes(cache_folder).items():
        if name != "manifest.json":
            assert (out / name).read_bytes() == data


def test_the_handler_of_sigterm_is_given_back(pair: Pair, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_cache(pair.config(tmp_path / "cache", n_tokens=100))
    assert signal.getsignal(signal.SIGTERM) is before


def test_checksums_and_sizes_are_those_of_the_published_files(cache_folder: Path) -> None:
    for shard in files.read_model(cache_folder / "manifest.json", Manifest)["shards"]:
        assert files.written(cache_folder / shard["name"]) == files.Written(shard["n_bytes"], shard["checksum"])
