"""Several hook points, parts and devices: every way to make a cache gives the bytes of the plain one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from caches import file_bytes
from conftest import Pair, failing_write

from crosscoders import ActivationCache, CorruptData, EnvironmentFault, InputError, cache_activations, run_cache
from crosscoders import cli as crosscoders_cli
from crosscoders.activations import parallel
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.plan import make_plan
from crosscoders.activations.settings import Part, parse_part
from crosscoders.activations.writer import write_caches
from crosscoders.common import files
from crosscoders.models.pair import ModelPair
from crosscoders.text.padding import Batch

POINTS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"]


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of each forward pass from now on."""
    passes: list[tuple[int, ...]] = []
    real = ModelPair.activations_at

    def counting(self: ModelPair, batch: Batch) -> object:
        passes.append(tuple(batch.numbers.tolist()))
        return real(self, batch)

    monkeypatch.setattr(ModelPair, "activations_at", counting)
    return passes


def moved_away(folder: Path) -> dict[str, bytes]:
    """The bytes of a cache, whose place is free afterwards, so that another can have the same `out`."""
    found = file_bytes(folder)
    shutil.rmtree(folder)
    return found


# -------------------------------------------------------------------------------------------------------- hook points


@pytest.mark.parametrize("points", [POINTS[:3], POINTS])
def test_each_of_several_hook_points_has_the_bytes_of_a_cache_made_alone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[str]
) -> None:
    out = tmp_path / "cache"
    alone = {}
    for point in points:
        cache_activations(pair.config(out / point, hook_point=point))
        alone[point] = moved_away(out / point)
    passes = counted_passes(monkeypatch)
    made = run_cache(pair.config(out, hook_point=points))
    assert made.folders == {point: str(out / point) for point in points}
    assert {point: file_bytes(out / point) for point in points} == alone
    assert len(passes) == len(set(passes)), "one pass of each batch feeds all hook points"
    with pytest.raises(InputError, match=r"holds a folder for each of its hook points. Name one: blocks.0.hook_resid"):
        ActivationCache(out)


@pytest.mark.parametrize("calls", [1, 4, 7, 14])
def test_several_hook_points_go_on_to_the_same_bytes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    config = pair.config(tmp_path / "cache", hook_point=POINTS[:2])
    run_cache(config)
    expected = [moved_away(tmp_path / "cache" / point) for point in POINTS[:2]]
    with failing_write(monkeypatch, "_published", lambda number, _: number == calls):
        run_cache(config)
    run_cache(config)
    assert [file_bytes(tmp_path / "cache" / point) for point in POINTS[:2]] == expected


def test_a_hook_point_that_is_there_already_is_not_made_again(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cache(pair.config(tmp_path, hook_point=POINTS[:1]))
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / POINTS[0]).iterdir() if f.name != ".lock"}
    run_cache(pair.config(tmp_path, hook_point=POINTS[:2]))
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / POINTS[0]).iterdir() if f.name != ".lock"} == before
    passes = counted_passes(monkeypatch)
    run_cache(pair.config(tmp_path, hook_point=POINTS[:2]))
    assert not passes


def test_lists_of_hook_points_that_make_no_sense_are_refused(pair: Pair, tmp_path: Path) -> None:
    for points, match in (([], "hook_point is empty"), ([POINTS[0], POINTS[0]], "names 'blocks.0.* twice")):
        with pytest.raises(InputError, match=match):
            pair.config(tmp_path, hook_point=points)
    with pytest.raises(InputError, match=r"blocks\.9\.hook_resid_post' is not in .* layers 0 to 2"):
        run_cache(pair.config(tmp_path, hook_point=[POINTS[0], "blocks.9.hook_resid_post"]))
    with pytest.raises(InputError, match="cache_activations makes one cache"):
        cache_activations(pair.config(tmp_path, hook_point=POINTS[:2]))


# ------------------------------------------------------------------------------------------------------------ devices


def test_two_devices_give_the_bytes_of_one(
    pair: Pair, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600",
            "--batch-rows=4", "--shard-tokens=128", "--dtype=float32", "--hook-point", POINTS[1],
            "--out", str(tmp_path / "cache"), "--devices", "cpu,cpu"]  # fmt: skip
    cache_activations(pair.config(tmp_path / "cache"))
    expected = moved_away(tmp_path / "cache")
    assert crosscoders_cli.main(argv) == 0
    assert "on 2 devices" in capsys.readouterr().err
    assert file_bytes(tmp_path / "cache") == expected and not (tmp_path / "cache/parts").exists()
    assert crosscoders_cli.main(argv) == 0
    assert "is complete already" in capsys.readouterr().err


def test_a_failure_on_one_device_ends_the_run_which_goes_on_to_the_same_bytes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # saves the import of torch in each process
    config = pair.config(tmp_path / "cache", hook_point=POINTS[:2])
    run_cache(config)
    expected = [moved_away(tmp_path / "cache" / point) for point in POINTS[:2]]
    second = tmp_path / "cache" / POINTS[0] / "parts/2-of-2"
    with (
        files.exclusive(second),  # so the second process cannot write
        pytest.raises(EnvironmentFault, match=rf"^on cpu: {second} is being written by process {os.getpid()}"),
    ):
        run_cache(config, devices=["cpu", "cpu"])
    for others in (["cpu"] * 3, None):
        with pytest.raises(InputError, match=r"begun with 2 devices. Give as many --devices to go on"):
            run_cache(config, devices=others)
    write_caches(config, make_plan(config), Part(1, 2), device="cpu")
    real = parallel._work

    def only_the_second(config: object, plan: object, part: Part, *others: object) -> None:
        assert part == Part(2, 2), "a finished part is not started again"
        real(config, plan, part, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(parallel, "_work", only_the_second)
    run_cache(config, devices=["cpu", "cpu"])
    assert [file_bytes(tmp_path / "cache" / point) for point in POINTS[:2]] == expected
    assert not any((tmp_path / "cache" / point / "parts").exists() for point in POINTS[:2])


def test_a_process_that_dies_is_named(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "START_METHOD", "fork")
    monkeypatch.setattr(parallel, "_work", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(EnvironmentFault, match=r"the process on cpu ended with status -9. Whole shards are kept"):
        run_cache(pair.config(tmp_path / "cache"), devices=["cpu", "cpu"])


def test_devices_that_are_not_there_or_contradict_are_one_line_before_anything_loads(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crosscoders.activations.caching.make_plan", lambda config: pytest.fail("text was tokenised"))
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--hook-point", POINTS[0],
            "--out", str(tmp_path / "cache")]  # fmt: skip
    for more, status, line in [
        (["--devices", "cpu,cuda:97"], 3, "device 'cuda:97' is not there: this machine has"),
        (["--devices", "cpu,,cpu"], 2, "device '' is unknown"),
        (["--devices", "cpu,tpu:1"], 2, "device 'tpu:1' is unknown. Use auto, cpu, cuda or cuda:N"),
        (["--devices", "cpu,cpu", "--part", "1/2"], 2, "part has no effect with devices"),
        (["--devices", "cpu,cpu", "--device", "cpu"], 2, "device 'cpu' has no effect with devices"),
        (["--device", "cuda:97"], 3, "device 'cuda:97' is not there"),
    ]:
        assert crosscoders_cli.main([*argv, *more]) == status
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_devices_do_not_take_over_what_one_process_has_begun(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pair.config(tmp_path / "cache")
    with failing_write(monkeypatch, "write_tensors", lambda _, path: path.name == "shard-00002.safetensors"):
        run_cache(config)
    with pytest.raises(InputError, match=r"was begun without --devices. Go on without it"):
        run_cache(config, devices=["cpu", "cpu"])


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture(scope="module")
def parts(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The cache of 5 shards in three parts; do not write to them."""
    folder = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        run_cache(pair.config(folder / str(number)), part=Part(number, 3))
    return [folder / str(number) for number in (1, 2, 3)]


def test_parts_cover_every_shard_once_for_every_count() -> None:
    for n_shards in range(1, 12):
        for of in range(1, n_shards + 1):
            found = [shard for number in range(1, of + 1) for shard in Part(number, of).shards(n_shards)]
            assert found == list(range(n_shards))
            sizes = [len(Part(number, of).shards(n_shards)) for number in range(1, of + 1)]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("of", [1, 2, 5])
@pytest.mark.parametrize("points", [POINTS[1], POINTS[:2]])
def test_merged_parts_have_the_bytes_of_a_cache_made_in_one_go(
    pair: Pair, tmp_path: Path, of: int, points: str | list[str]
) -> None:
    config = pair.config(tmp_path / "cache", hook_point=points)
    names = [""] if isinstance(points, str) else points
    run_cache(config)
    expected = [file_bytes(tmp_path / "cache" / name) for name in names]
    shutil.rmtree(tmp_path / "cache")
    for number in range(1, of + 1):
        run_cache(pair.config(tmp_path / str(number), hook_point=points), part=Part(number, of))
    folders = [str(tmp_path / str(number)) for number in reversed(range(1, of + 1))]
    merge_parts(folders, str(tmp_path / "cache"))
    assert [file_bytes(tmp_path / "cache" / name) for name in names] == expected
    for folder in folders:
        shutil.rmtree(folder)
    ActivationCache(tmp_path / "cache" / names[0]).read(0, 600)


def test_shard_files_are_linked_or_else_copied_and_checked(
    parts: list[Path], cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_parts([str(p) for p in parts], str(tmp_path / "linked"))
    name = "shard-00000.safetensors"
    assert (tmp_path / "linked" / name).samefile(parts[0] / name)

    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    merge_parts([str(p) for p in parts], str(tmp_path / "copied"))
    assert not (tmp_path / "copied" / name).samefile(parts[0] / name)
    assert (tmp_path / "copied" / name).read_bytes() == (cache_folder / name).read_bytes()
    copy = tmp_path / "damaged"
    shutil.copytree(parts[0], copy)
    data = bytearray((copy / name).read_bytes())
    data[500] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(CorruptData, match=f"damaged/{name} does not match its checksum"):
        merge_parts([str(copy), str(parts[1]), str(parts[2])], str(tmp_path / "bad"))
    assert sorted(f.name for f in (tmp_path / "bad").iterdir()) == [".lock"]


def test_a_part_runs_the_forward_passes_of_its_own_range_only(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted_passes(monkeypatch)
    run_cache(pair.config(tmp_path / "whole"))
    whole = passes.copy()
    by_part = []
    for number in (1, 2, 3):
        passes.clear()
        run_cache(pair.config(tmp_path / str(number)), part=Part(number, 3))
        by_part.append(passes.copy())
    # Neighbours share at most the pass that holds the border between them.
    assert sorted({p for found in by_part for p in found}) == sorted(whole)
    assert sum(map(len, by_part)) <= len(whole) + 2
    assert all(len(found) < len(whole) for found in by_part)


def test_a_part_goes_on_and_is_no_cache_and_no_other_part(
    pair: Pair, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pair.config(tmp_path / "part")
    with failing_write(monkeypatch, "write_tensors", lambda _, path: path.name == "shard-00002.safetensors"):
        run_cache(config, part=Part(2, 3))
    with pytest.raises(InputError, match=r"part is not finished. Run its `crosscoders cache` command again"):
        merge_parts([str(parts[0]), config.out, str(parts[2])], str(tmp_path / "out"))
    run_cache(config, part=Part(2, 3))
    merge_parts([str(parts[0]), config.out, str(parts[2])], str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"is one part of a cache. Put all parts together with"):
        ActivationCache(config.out)
    for part in (Part(3, 3), None):
        with pytest.raises(InputError, match=r"holds a cache with another part \('2/3', now"):
            run_cache(config, part=part)


@pytest.mark.parametrize("text", ["5/4", "0/4", "1/0", "2", "a/b", "-1/4", "1/4/2", ""])
def test_a_part_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"part '{text}' is not i/n with i from 1 to n"):
        parse_part(text)


def test_more_parts_than_shards_are_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"asks for 6 parts of a cache of 5 shards. Use at most 5 parts"):
        run_cache(pair.config(tmp_path), part=Part(1, 6))


def changed_part(pair: Pair, folder: Path, **changes: object) -> str:
    run_cache(pair.config(folder / "changed", **changes), part=Part(2, 3))
    return str(folder / "changed")


@pytest.mark.parametrize(
    "choose, match",
    [
        (lambda a, b, c, new, whole: [a, b], "part 3/3 is missing. Give all 3 parts, or make it with"),
        (lambda a, b, c, new, whole: [b, c], "part 1/3 is missing"),
        (lambda a, b, c, new, whole: [a, b, c, b], "part 2/3 is given twice: .*/2 and .*/2. Give each part once"),
        (lambda a, b, c, new, whole: [a, new(seed=5), c], "changed has another token_hash than .*/1 "),
        (lambda a, b, c, new, whole: [a, new(hook_point=POINTS[0]), c], "another hook_point than .*blocks.0.* and .*"),
        (lambda a, b, c, new, whole: [a, new(shard_tokens=100), c], "another shard_tokens than .* \\(100 and 128\\)"),
        (lambda a, b, c, new, whole: [a, new(hook_point=POINTS[:2]), c], "changed has no part for one hook point"),
        (lambda a, b, c, new, whole: [a, whole, c], "is a whole cache, not a part of one. Leave it out"),
        (lambda a, b, c, new, whole: [a, "no/such", c], "no/such is no part of a cache: it has no part.json"),
    ],
)
def test_parts_that_do_not_make_a_cache_are_refused(
    pair: Pair, parts: list[Path], cache_folder: Path, tmp_path: Path, choose: Callable[..., list[str]], match: str
) -> None:
    chosen = choose(*map(str, parts), lambda **changes: changed_part(pair, tmp_path, **changes), str(cache_folder))
    with pytest.raises(InputError, match=match):
        merge_parts(chosen, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_parts_of_another_count_and_damaged_parts_are_refused(pair: Pair, parts: list[Path], tmp_path: Path) -> None:
    run_cache(pair.config(tmp_path / "half"), part=Part(2, 2))
    with pytest.raises(InputError, match="there are parts of 2 and parts of 3"):
        merge_parts([str(parts[0]), str(tmp_path / "half")], str(tmp_path / "out"))
    shutil.copytree(parts[1], tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptData, match=r"cut/shard-00001.safetensors has \d+ bytes but part.json says \d+"):
        merge_parts([str(parts[0]), str(tmp_path / "cut"), str(parts[2])], str(tmp_path / "out"))
    entry = json.loads((tmp_path / "cut" / "part.json").read_text())
    entry["shards"].pop()
    files.write_json(tmp_path / "cut" / "part.json", entry)
    with pytest.raises(CorruptData, match="the parts hold 4 shards of 472 tokens, not 5 of 600"):
        merge_parts([str(parts[0]), str(tmp_path / "cut"), str(parts[2])], str(tmp_path / "out"))


def test_a_folder_that_holds_a_cache_is_not_merged_into(parts: list[Path], cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a cache already \(manifest.json\). Choose another --out"):
        merge_parts([str(p) for p in parts], str(cache_folder))
    with pytest.raises(InputError, match=r"holds a cache already \(part.json\)"):
        merge_parts([str(p) for p in parts], str(parts[0]))


def test_parts_and_merge_from_the_command_line(
    pair: Pair, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600",
            "--batch-rows=4", "--shard-tokens=128", "--dtype=float32"]  # fmt: skip
    points = json.dumps(POINTS[:2])
    for number in (1, 2):
        out = str(tmp_path / str(number))
        assert crosscoders_cli.main([*argv, "--hook-point", points, "--part", f"{number}/2", "--out", out]) == 0
    assert "next: crosscoders merge" in capsys.readouterr().err
    out = str(tmp_path / "a cache")
    assert crosscoders_cli.main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", out, "--json"]) == 0
    captured = capsys.readouterr()
    assert [row["name"] for row in json.loads(captured.out)["rows"]][:3] == [
        f"cache.{POINTS[0]}.tokens", f"cache.{POINTS[0]}.mean_norm.base", f"cache.{POINTS[0]}.mean_norm.tuned",
    ]  # fmt: skip
    assert f"next: crosscoders train --cache '{out}/{POINTS[0]}' --out RUN" in captured.err
    assert ActivationCache(f"{out}/{POINTS[1]}").manifest_hash == ActivationCache(cache_folder).manifest_hash
    assert crosscoders_cli.main([*argv, "--hook-point", points, "--part", "5/4", "--out", out]) == 2
    assert "error: part '5/4' is not i/n" in capsys.readouterr().err
    assert crosscoders_cli.main(["merge", "--out", out]) == 2
    assert "parts must be given" in capsys.readouterr().err
