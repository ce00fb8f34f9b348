"""Memory: counted without loading, refused before anything loads, said in the opening line."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Pair

from crosscoders import CacheConfig, CrosscoderConfig, TrainConfig, load_pair, run_cache
from crosscoders import cli as crosscoders_cli
from crosscoders.activations import needs
from crosscoders.activations.plan import make_plan
from crosscoders.common import memory, room
from crosscoders.models import skeleton
from crosscoders.training import feed

POINT = "blocks.1.hook_resid_post"
CPU = torch.device("cpu")


def test_parameters_are_counted_as_they_are_loaded(pair: Pair) -> None:
    import transformers

    cut = load_pair(pair.base, pair.tuned, POINT).models[0]
    whole = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
    for model, n_layers in ((cut, 2), (whole, None)):
        assert skeleton.parameter_count(pair.base, n_layers) == sum(p.numel() for p in model.parameters())


def test_free_memory_is_no_more_than_there_is_and_that_no_more_than_the_machine_has() -> None:
    room = memory.ram_room()
    assert 0 < room.free <= room.total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_control_groups_limit_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "sys/fs/cgroup/outer/inner"
    group.mkdir(parents=True)
    for folder, limit in ((group, "max"), (group.parent, "5000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("4000\n")
        (folder / "memory.stat").write_text("anon 3000\ninactive_file 700\n")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("5:cpu:/\n0::/outer/inner\n")
    monkeypatch.setattr(room, "Path", lambda first, *rest: Path(f"{tmp_path}{first}", *rest))
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000, total=9000))
    assert memory.ram_room() == (5000 - 4000 + 700, 5000)
    (group.parent / "memory.max").write_text("max\n")
    assert memory.ram_room() == (8000, 9000)


def test_a_training_run_counts_weights_batch_and_buffer_on_paper() -> None:
    config = TrainConfig(crosscoder=CrosscoderConfig(dict_size=1000, k=4), batch_size=2000, buffer_tokens=50_000)
    need = feed.train_need(config, n_models=2, d_model=10, itemsize=2, n_heldout=300, device=CPU)
    n_parameters = 1000 * 10 * 2 * 2 + 1000 + 20
    batch = 2000 * (3 * 1000 + 6 * 20) * 4  # more than a checkpoint of 12 bytes per parameter
    assert need.ram - memory.PROCESS_BYTES == 16 * n_parameters + batch + (2 * 50_000 + 300) * 20 * 2 and need.gpu == 0
    on_gpu = feed.train_need(config, n_models=2, d_model=10, itemsize=2, n_heldout=10**9, device=torch.device("cuda"))
    assert on_gpu.gpu == 16 * n_parameters + batch
    assert on_gpu.ram - memory.PROCESS_BYTES == (4 + 12) * n_parameters + (2 * 50_000 + 65_536) * 20 * 2


def test_more_hook_points_rows_and_tokens_in_a_shard_need_more(pair: Pair, tmp_path: Path) -> None:
    def need(n_points: int = 1, **changes: object) -> int:
        config: CacheConfig = pair.config(tmp_path, **changes)
        return needs.cache_need(config, make_plan(config), n_points=n_points, device=CPU).ram

    plain = need()
    assert need(n_points=2) > plain
    assert need(batch_rows=8) > plain
    assert need(shard_tokens=200) > plain
    assert need(shard_tokens=10_000) == need(shard_tokens=600), "a shard is never larger than the cache"
    gpu = needs.cache_need(
        pair.config(tmp_path), make_plan(pair.config(tmp_path)), n_points=1, device=torch.device("cuda")
    )
    assert gpu.gpu > 0 and gpu.device == torch.device("cuda")


def test_too_little_memory_is_one_line_before_anything_loads(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(50_000_000, 100_000_000))
    monkeypatch.setattr("crosscoders.activations.source.load_pair", lambda *a, **k: pytest.fail("a model was loaded"))
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600"]
    assert crosscoders_cli.main([*argv, "--hook-point", POINT, "--out", str(tmp_path / "cache")]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("error: this needs about 15")
        and "MB of memory, but there are 100.0 MB. Lower batch_rows" in line
    )
    assert not (tmp_path / "cache").exists()
    (tmp_path / "live.yaml").write_text(
        f"base: {pair.base}\ntuned: {pair.tuned}\ndata: {pair.data}\nhook_point: {POINT}\nn_tokens: 600\n"
    )
    train = ["train", "--crosscoder.k", "4", "--batch-size", "64", "--n-tokens", "6400", "--lr-warmup-steps", "5"]
    train += ["--out", str(tmp_path / "run")]
    for source in (["--cache", str(cache_folder)], ["--live", str(tmp_path / "live.yaml")]):
        assert crosscoders_cli.main([*train, *source]) == 3
        line = capsys.readouterr().err.splitlines()[-1]
        assert "but there are 100.0 MB. Lower crosscoder.dict_size, batch_size or" in line
        assert line.endswith("--force goes on all the same.")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from crosscoders import EnvironmentFault

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000_000_000, 8_000_000_000))
    need = memory.Need(1000, 9_000_000_000, torch.device("cuda:1"))
    with pytest.raises(EnvironmentFault, match=r"about 9.0 GB of memory on cuda:1, but there are 8.0 GB. Mend"):
        memory.require([need], "Mend.")
    assert "about 1.0 GB of memory on cuda:1 (2.0 GB free)" in memory.require([need._replace(gpu=10**9)], "")
    with pytest.raises(EnvironmentFault, match=r"about 8.2 GB of memory on cuda:1"):  # two processes on one GPU
        memory.require([need._replace(gpu=41 * 10**8)] * 2, "")


@pytest.mark.parametrize(
    "wanted, force, warned",
    [(1500, False, "1.5 kB of memory, but 1.0 kB are free. Mend."), (2500, True, "2.5 kB of memory, but 1.0 kB are")],
)
def test_more_than_is_free_is_a_warning_and_so_is_more_than_there_is_with_force(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: int, force: bool, warned: str
) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(1000, 2000))
    assert memory.require([memory.Need(wanted)], "Mend.", force=force) == (
        f"about {wanted / 1000:.1f} kB of memory (1.0 kB free)"
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: this needs about ") and warned in line


def test_what_fits_is_not_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(1000, 2000))
    memory.require([memory.Need(1000)], "Mend.")
    assert capsys.readouterr().err == ""


def test_force_caches_and_trains_where_the_estimate_is_above_the_machine(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(50_000_000, 100_000_000))
    cache, run = str(tmp_path / "cache"), str(tmp_path / "run")
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600"]
    assert crosscoders_cli.main([*argv, "--hook-point", POINT, "--out", cache, "--force"]) == 0
    train = ["train", "--cache", cache, "--out", run, "--crosscoder.k", "4", "--crosscoder.dict-size", "24"]
    train += ["--batch-size", "64", "--n-tokens", "640", "--lr-warmup-steps", "5", "--force"]
    assert crosscoders_cli.main(train) == 0
    assert capsys.readouterr().err.count("warning: this needs about") == 2


def test_the_opening_line_says_the_estimate(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cache(pair.config(tmp_path / "cache"))
    assert "; needs about 15" in capsys.readouterr().err
