"""Store and cache: same bytes whatever happens, aligned pairs, every corruption found."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import file_bytes
from conftest import Pair, failing_write

from crosscoders import ActivationCache, CorruptData, EnvironmentFault, InputError, cache_activations, load_pair
from crosscoders.activations.scored import concatenate
from crosscoders.activations.source import ActivationSource
from crosscoders.common import files
from crosscoders.models.hooks import run_to
from crosscoders.text.tokens import ROLES, tokenize_documents


def test_each_stored_token_is_the_models_own_activation_of_its_document(pair: Pair, cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post")
    rows = tokenize_documents(pair.config(cache_folder).data_config(), loaded.info.tokenizer)
    tokens = cache.read(0, len(cache))
    for t in range(0, len(cache), 37):
        document, position = int(tokens.document_ids[t]), int(tokens.positions[t])
        ids = torch.from_numpy(rows.ids[rows.offsets[document] : rows.offsets[document + 1]]).long()[None]
        assert int(tokens.token_ids[t]) == int(ids[0, position])
        for m, model in enumerate(loaded.models):
            seen = run_to(model, ["blocks.1.hook_resid_post"], ids, torch.ones_like(ids))["blocks.1.hook_resid_post"]
            # one document alone against a padded batch: the same up to the order of sums
            torch.testing.assert_close(tokens.activations[t, m], seen[0, position], rtol=1e-5, atol=1e-5)


def test_no_bos_and_no_padding_is_stored(cache_folder: Path) -> None:
    tokens = ActivationCache(cache_folder).read(0, 600)
    assert not torch.isin(tokens.token_ids, torch.tensor([0, 2])).any()
    assert int(tokens.positions.min()) == 1


def test_statistics_are_those_of_the_stored_values(cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    x = cache.read(0, len(cache)).activations.double()
    found = cache.manifest["statistics"]
    torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), x.mean(dim=0))
    torch.testing.assert_close(torch.tensor(found["mean_norm"], dtype=torch.float64), x.norm(dim=2).mean(dim=0))
    torch.testing.assert_close(torch.tensor(found["mean_squared_norm"], dtype=torch.float64), x.pow(2).sum(2).mean(0))


def test_two_runs_give_the_same_bytes(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    cache_activations(pair.config(tmp_path / "again"))
    first, again = file_bytes(cache_folder), file_bytes(tmp_path / "again")
    first_manifest, again_manifest = (json.loads(files.pop("manifest.json")) for files in (first, again))
    assert first == again
    for manifest in (first_manifest, again_manifest):
        manifest["config"].pop("out"), manifest.pop("content_checksum")
    assert first_manifest == again_manifest


def test_bfloat16_is_the_default_and_rounds_only(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    rounded = cache_activations(pair.config(tmp_path / "bf16", dtype="bfloat16")).read(0, 600).activations
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, ActivationCache(cache_folder).read(0, 600).activations.bfloat16())


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_run_that_stops_at_any_write_goes_on_to_the_same_bytes(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    out = tmp_path / "cache"
    with failing_write(monkeypatch, "_published", lambda number, _: number == calls):
        cache_activations(pair.config(out))
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        ActivationCache(out)
    cache_activations(pair.config(out))
    expected, found = file_bytes(cache_folder), file_bytes(out)
    assert {n: b for n, b in found.items() if n != "manifest.json"} == {
        n: b for n, b in expected.items() if n != "manifest.json"
    }


def test_a_cache_killed_and_resumed_has_the_bytes_of_an_uninterrupted_one(
    pair: Pair, cache_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    # The child slows down after the second shard, so that the kill falls inside the run.
    script = (
        "import sys, time; sys.path[:0] = [sys.argv[2]]\n"
        "import torch; torch.set_num_threads(1)\n"
        "from conftest import Pair; from pathlib import Path; from crosscoders import cache_activations\n"
        "from crosscoders.common import files\n"
        "real = files.write_tensors\n"
        "def slow(path, tensors):\n"
        "    if path.name.startswith('shard-00002'): print('ready', flush=True); time.sleep(60)\n"
        "    return real(path, tensors)\n"
        "files.write_tensors = slow\n"
        "cache_activations(Pair(Path(sys.argv[1])).config(Path(sys.argv[3])))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(pair.folder), str(Path(__file__).parents[2]), str(out)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert sorted(f.name for f in out.glob("shard*")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    cache_activations(pair.config(out))
    for name, data in file_bytes(cache_folder).items():
        if name != "manifest.json":
            assert (out / name).read_bytes() == data


def test_a_live_source_gives_the_bytes_of_the_cache(pair: Pair, cache_folder: Path) -> None:
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post")
    rows = tokenize_documents(pair.config(cache_folder).data_config(), loaded.info.tokenizer)
    source = ActivationSource(loaded, rows, hook_point="blocks.1.hook_resid_post", batch_rows=4, dtype=torch.float32)
    cache = ActivationCache(cache_folder)
    for start, stop in ((0, 600), (130, 131), (200, 390)):
        live, stored = concatenate(list(source.read(start, stop))), cache.read(start, stop)
        assert all(torch.equal(a, b) for a, b in zip(live, stored, strict=True))


def test_template_roles_and_groups_are_stored(cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    tokens = cache.read(0, 600)
    assert cache.manifest["groups"] and set(cache.manifest["groups"]) == {"raw", "describe"}
    raw = tokens.groups == cache.manifest["groups"].index("raw")
    assert (tokens.roles[raw] == ROLES.index("text")).all()
    assert set(tokens.roles[~raw].tolist()) == {ROLES.index(name) for name in ("template", "user", "assistant")}
    turn_start = tokens.token_ids == 3
    assert turn_start.any() and (tokens.roles[turn_start] == ROLES.index("template")).all()


def damaged(cache_folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(cache_folder, copy)
    return copy


def test_a_shard_short_of_one_byte_is_refused_when_opened(cache_folder: Path, tmp_path: Path) -> None:
    copy = damaged(cache_folder, tmp_path)
    shard = copy / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptData, match=r"shard-00001.safetensors has \d+ bytes but the manifest says"):
        ActivationCache(copy)


@pytest.mark.parametrize("where", [3, 200, 0.5, -1])
def test_one_flipped_bit_is_refused_when_read(cache_folder: Path, tmp_path: Path, where: float) -> None:
    copy = damaged(cache_folder, tmp_path)
    shard = copy / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CorruptData, match=r"shard-00002.safetensors does not match its checksum"):
        ActivationCache(copy).read(0, 600)


def test_a_missing_shard_and_a_broken_manifest_are_refused(cache_folder: Path, tmp_path: Path) -> None:
    copy = damaged(cache_folder, tmp_path)
    (copy / "shard-00000.safetensors").unlink()
    with pytest.raises(CorruptData, match=r"shard-00000.safetensors is missing"):
        ActivationCache(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CorruptData, match="is not valid JSON"):
        ActivationCache(copy)


def test_a_finished_cache_is_not_made_again_and_another_plan_is_refused(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = damaged(cache_folder, tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in copy.glob("*.safetensors")}
    cache_activations(pair.config(copy))
    assert {f.name: f.stat().st_mtime_ns for f in copy.glob("*.safetensors")} == before
    with pytest.raises(InputError, match="holds a cache with another hook_point"):
        cache_activations(pair.config(copy, hook_point="blocks.0.hook_resid_post"))


def test_the_same_models_under_another_path_are_the_same_plan_and_the_same_cache(
    pair: Pair, cache_folder: Path, tmp_path: Path
) -> None:
    copy = damaged(cache_folder, tmp_path)
    shutil.copytree(pair.base, tmp_path / "moved")
    moved = pair.config(copy, base=str(tmp_path / "moved"))
    assert cache_activations(moved).manifest_hash == ActivationCache(cache_folder).manifest_hash
    again = cache_activations(pair.config(tmp_path / "again", base=str(tmp_path / "moved")))
    assert again.manifest_hash == ActivationCache(cache_folder).manifest_hash


def test_a_second_writer_is_refused(pair: Pair, tmp_path: Path) -> None:
    with (
        files.exclusive(tmp_path / "cache"),
        pytest.raises(EnvironmentFault, match=rf"is being written by process {os.getpid()} on"),
    ):
        cache_activations(pair.config(tmp_path / "cache"))


def test_too_little_disk_is_refused_before_a_model_loads(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosscoders.activations.source.load_pair", lambda *a, **k: pytest.fail("a model was loaded"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"needs 87.* kB but its disk has 1.0 kB free. Lower --n-tokens"):
        cache_activations(pair.config(tmp_path / "cache"))


def test_a_full_disk_is_one_line_and_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"no space left for .*it needs 3 B and"):
        files.write_bytes(tmp_path / "file", b"abc")
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_activation_names_model_document_and_position(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosscoders.models.pair import ModelPair

    real = ModelPair.activations_at

    def poisoned(self: ModelPair, batch: object) -> dict[str, torch.Tensor]:
        found = real(self, batch)  # type: ignore[arg-type]
        found["blocks.1.hook_resid_post"][1, 4, 1, 0] = float("inf")
        return found

    monkeypatch.setattr(ModelPair, "activations_at", poisoned)
    with pytest.raises(CorruptData, match=r"tuned' gives a non-finite activation at .* document \d+, position 4\."):
        cache_activations(pair.config(tmp_path / "cache"))


def test_a_lock_is_free_again_after_its_holder_was_killed(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from crosscoders.common import files\n" \
        "with files.exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(EnvironmentFault, match=f"process {child.pid}"), files.exclusive(tmp_path):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    time.sleep(0.05)
    with files.exclusive(tmp_path):
        assert (tmp_path / ".lock").is_file()


@pytest.mark.parametrize(
    "code, line",
    [
        (errno.EAGAIN, r"is being written by another process\. Wait for it"),
        (errno.ENOLCK, r"cannot write to .*: its file system has no locks\. Choose another folder\."),
        (errno.EIO, r"cannot write to .*: Input/output error\. Choose another folder\."),
    ],
)
def test_a_lock_that_cannot_be_had_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    def refused(handle: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(EnvironmentFault, match=line), files.exclusive(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_or_written_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"file/x: Not a directory"), files.exclusive(tmp_path / "file" / "x"):
        pass
    real = os.open

    def read_only(path: object, *rest: Any, **others: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(EnvironmentFault, match=r"cannot write to .*: Permission denied"), files.exclusive(tmp_path):
        pass
