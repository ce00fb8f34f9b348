"""Caches behind URLs: the bytes of a local one, checked on the way up and down, and no half upload is trusted."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from caches import file_bytes
from conftest import Pair
from fsspec.implementations.memory import MemoryFileSystem

from crosscoders import ActivationCache, CorruptData, EnvironmentFault, InputError, cache_activations, run_cache
from crosscoders import cli as crosscoders_cli
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.settings import Part
from crosscoders.common.folders import RemoteFolder

URL = "memory://bucket/cache"


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()


def remote_bytes(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in sorted(fs.find(root, maxdepth=1))}


def without_out(files: dict[str, bytes]) -> dict[str, object]:
    """The files, and the manifest without the one setting that differs and the checksum over it."""
    manifest = json.loads(files["manifest.json"])
    manifest["config"].pop("out"), manifest.pop("content_checksum")
    return {**files, "manifest.json": manifest}


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_remote_cache_has_the_bytes_of_a_local_one_and_reads_the_same(
    pair: Pair, cache_folder: Path, tmp_path: Path, protocol: str
) -> None:
    url = URL if protocol == "memory" else f"file://{tmp_path}/bucket/cache"
    made = cache_activations(pair.config(url))
    assert without_out(remote_bytes(url)) == without_out(file_bytes(cache_folder))
    assert str(made.path) == url and made.manifest_hash == ActivationCache(cache_folder).manifest_hash
    local = ActivationCache(cache_folder).read(100, 500)
    assert all((a == b).all() for a, b in zip(ActivationCache(url).read(100, 500), local, strict=True))
    run = str(tmp_path / "run")
    argv = "--crosscoder.dict-size 24 --crosscoder.k 4 --n-tokens 640 --batch-size 64 --lr-warmup-steps 5".split()
    assert crosscoders_cli.main(["train", "--cache", url, "--out", run, *argv]) == 0


def test_several_hook_points_and_parts_work_behind_a_url(pair: Pair, tmp_path: Path) -> None:
    points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    run_cache(pair.config("memory://whole", hook_point=points))
    expected = [remote_bytes(f"memory://whole/{point}") for point in points]
    for number in (1, 2):
        run_cache(pair.config(f"memory://part-{number}", hook_point=points), part=Part(number, 2))
    merge_parts(["memory://part-1", "memory://part-2"], "memory://merged")
    found = [remote_bytes(f"memory://merged/{point}") for point in points]
    assert list(map(without_out, found)) == list(map(without_out, expected))
    with pytest.raises(InputError, match=r"memory://merged/.* holds a cache already"):
        merge_parts(["memory://part-1", "memory://part-2"], "memory://merged")
    with pytest.raises(InputError, match=r"is remote and .*/local/.* is not. Put both on one side"):
        merge_parts(["memory://part-1", "memory://part-2"], str(tmp_path / "local"))


@pytest.mark.parametrize("how", ["raises", "writes half"])
@pytest.mark.parametrize("number", [0, 3])
def test_an_upload_that_fails_half_way_names_the_shard_and_the_run_goes_on(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, number: int
) -> None:
    real = MemoryFileSystem.put_file
    name = f"shard-{number:05d}.safetensors"

    def failing(self: MemoryFileSystem, local: str, path: str, **settings: object) -> None:
        if path.endswith(name):
            self.pipe_file(path, Path(local).read_bytes()[:1000])
            if how == "raises":
                raise ConnectionResetError("connection reset by peer")
            return
        real(self, local, path, **settings)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    cause = "connection reset by peer" if how == "raises" else "what was read back differs"
    with pytest.raises(EnvironmentFault, match=rf"upload of {URL}/{name} failed: {cause}. Finished shards are kept"):
        cache_activations(pair.config(URL))
    with pytest.raises(InputError, match="is not finished" if number else "is not an activation cache"):
        ActivationCache(URL)
    uploaded: list[str] = []

    def counting(self: MemoryFileSystem, local: str, path: str, **settings: object) -> None:
        uploaded.append(path.rsplit("/", 1)[-1])
        real(self, local, path, **settings)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counting)
    cache_activations(pair.config(URL))
    assert [n for n in uploaded if "shard" in n] == [f"shard-{n:05d}.safetensors" for n in range(number, 5)]
    assert uploaded[-1] == "manifest.json"
    assert without_out(remote_bytes(URL)) == without_out(file_bytes(cache_folder))


def test_a_remote_shard_that_changed_or_is_missing_is_refused(pair: Pair, tmp_path: Path) -> None:
    cache_activations(pair.config(URL))
    fs, root = fsspec.core.url_to_fs(URL)
    shard = f"{root}/shard-00001.safetensors"
    data = bytearray(fs.cat_file(shard))
    data[900] ^= 1
    fs.pipe_file(shard, bytes(data))
    with pytest.raises(CorruptData, match=f"{URL}/shard-00001.safetensors does not match its checksum"):
        ActivationCache(URL).read(0, 600)
    fs.pipe_file(shard, bytes(data[:-1]))
    with pytest.raises(CorruptData, match=r"shard-00001.safetensors has \d+ bytes but the manifest says"):
        ActivationCache(URL)
    fs.rm_file(shard)
    with pytest.raises(CorruptData, match=r"shard-00001.safetensors is missing"):
        ActivationCache(URL)
    fs.pipe_file(f"{root}/manifest.json", b"{")
    with pytest.raises(CorruptData, match=rf"{URL}/manifest.json is not valid JSON"):
        ActivationCache(URL)


def test_a_protocol_without_its_package_and_one_that_is_none_are_one_line(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("crosscoders.activations.caching.make_plan", lambda config: pytest.fail("text was tokenised"))
    with pytest.raises(InputError, match="has the protocol 'nosuch', which fsspec does not know"):
        run_cache(pair.config("nosuch://bucket/x"))
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for url, package in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("sftp://h/x", r"fsspec\[sftp\]")):
        with pytest.raises(EnvironmentFault, match=f"needs the fsspec package for .*Run: pip install '?{package}"):
            run_cache(pair.config(url))


def test_a_refused_connection_is_one_line_before_a_model_loads(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: MemoryFileSystem, path: str, **settings: object) -> None:
        raise PermissionError("access denied")

    monkeypatch.setattr("crosscoders.activations.writer.open_source", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(MemoryFileSystem, "ls", refused)
    with pytest.raises(EnvironmentFault, match=f"listing {URL} failed: access denied"):
        run_cache(pair.config(URL))


def test_devices_need_a_local_folder(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"devices need a local --out, not memory://bucket/cache. Use --part"):
        run_cache(pair.config(URL), devices=["cpu", "cpu"])


def test_the_temporary_folder_must_hold_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"needs 1.4 kB but its disk has 1.0 kB free. Set TMPDIR"):
        RemoteFolder(URL).require_space(10_000, 700, "unused")
