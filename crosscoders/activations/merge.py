"""Parts of one cache -> the cache, with the bytes of a run that made it in one go.

`merge_parts` is `crosscoders merge`; `merge_point` puts the parts of one hook point together. Shard files are linked
where the disk allows it and copied elsewhere, the sums of the parts' shards become the statistics, manifest last.
"""

from typing import Any

from crosscoders.activations.settings import Part, parse_part
from crosscoders.activations.shards import FINAL, PartRecord, build_manifest, first_difference, shard_name
from crosscoders.activations.sums import read_sums, sums_name
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.files import Written
from crosscoders.common.folders import Folder, open_folder

OF_ONE_PART = ("part", "config", "shards")
"""Keys of part.json that may differ between the parts of one cache."""


def merge_parts(parts: list[str], out: str) -> list[str]:
    """Merge the folders of all parts into `out`; return the folder of each hook point, `out` itself for one.

    Raises:
        InputError: a folder is no part or not finished; parts of different plans; one missing or given twice; `out`
            holds a cache.
        CorruptData: a shard is missing or has another size.
        EnvironmentFault: a second writer, no space for copies.
    """
    points = [_points(open_folder(part)) for part in parts]
    names = sorted({name for folders in points for name in folders})
    targets = []
    for name in names:
        lacking = next((part for part, folders in zip(parts, points, strict=True) if name not in folders), None)
        if lacking is not None:
            raise InputError(
                f"{lacking} has no part for {name or 'one hook point'}, others have. Merge parts of one run."
            )
    for name in names:
        target = f"{out.rstrip('/')}/{name}" if name else out
        folder = open_folder(target)
        with folder.exclusive():
            published = [file for file in (*FINAL, "progress.json", "run.json") if file in folder.sizes()]
            if published:
                what = "run" if published[0] == "run.json" else "cache"
                raise InputError(f"{target} holds a {what} already ({published[0]}). Choose another --out.")
            merge_point([folders[name] for folders in points], folder, target)
        targets.append(target)
    return targets


def _points(folder: Folder) -> dict[str, Folder]:
    """Return the folders of the hook points of a part; a part of one hook point is named by the empty string."""
    if any(name in folder.sizes() for name in (*FINAL, "progress.json")):
        return {"": folder}
    inner_folders = {name: open_folder(f"{folder}/{name}") for name in folder.subfolders()}
    inner_folders = {
        name: inner
        for name, inner in inner_folders.items()
        if any(file in inner.sizes() for file in ("part.json", "progress.json"))
    }
    return inner_folders or {"": folder}


def merge_point(parts: list[Folder], folder: Folder, out: str) -> None:
    """Merge the parts of one hook point into `folder`; `out` is what its manifest calls it."""
    entries = [(part, _read_part(part)) for part in parts]
    _require_one_plan(entries)
    entries = _in_order(entries)
    first = entries[0][1]
    shape = first["n_models"], first["d_model"]
    shards = []
    for part, entry in entries:
        for shard in entry["shards"]:
            shards.append(read_sums(part, shard["name"], shape))
            if any(shards[-1][key] != value for key, value in shard.items()):
                raise CorruptData(
                    f"{part}/part.json and {sums_name(shard['name'])} describe two different shards. Remove {part} and "
                    "make this part again."
                )
    _require_whole(shards, first)
    for part, entry in entries:
        there = part.sizes()
        for shard in entry["shards"]:
            if there.get(shard["name"]) != shard["n_bytes"]:
                raise CorruptData(
                    f"{part}/{shard['name']} has {there.get(shard['name'], 0)} bytes but part.json says "
                    f"{shard['n_bytes']}. Remove {part} and make this part again."
                )
    for part, entry in entries:
        for shard in entry["shards"]:
            folder.adopt(part, shard["name"], Written(shard["n_bytes"], shard["checksum"]))
    header = {key: value for key, value in first.items() if key not in OF_ONE_PART}
    folder.write_json("manifest.json", build_manifest(header, first["config"] | {"out": out}, shards))


def _read_part(folder: Folder) -> dict[str, Any]:
    there = folder.sizes()
    if "part.json" in there:
        return folder.read_model("part.json", PartRecord)
    if "progress.json" in there:
        raise InputError(f"{folder} is not finished. Run its `crosscoders cache` command again; it goes on.")
    if "manifest.json" in there:
        raise InputError(f"{folder} is a whole cache, not a part of one. Leave it out.")
    raise InputError(f"{folder} is no part of a cache: it has no part.json. Make it with `crosscoders cache --part`.")


def _require_one_plan(entries: list[tuple[Folder, dict[str, Any]]]) -> None:
    first, plan = entries[0]
    wanted = {key: value for key, value in plan.items() if key not in OF_ONE_PART}
    for folder, entry in entries[1:]:
        key = first_difference(entry, wanted)
        if key:
            raise InputError(
                f"{folder} has another {key} than {first} ({entry.get(key)!r} and {wanted[key]!r}). "
                "Merge parts of one run."
            )


def _in_order(entries: list[tuple[Folder, dict[str, Any]]]) -> list[tuple[Folder, dict[str, Any]]]:
    """Return the parts by number, each once."""
    by_number: dict[Part, tuple[Folder, dict[str, Any]]] = {}
    for folder, entry in entries:
        part = parse_part(entry["part"])
        if part in by_number:
            raise InputError(f"part {part} is given twice: {by_number[part][0]} and {folder}. Give each part once.")
        by_number[part] = folder, entry
    counts = sorted({part.of for part in by_number})
    if len(counts) > 1:
        raise InputError(f"there are parts of {counts[0]} and parts of {counts[1]}. Merge parts of one run.")
    missing = [number for number in range(1, counts[0] + 1) if Part(number, counts[0]) not in by_number]
    if missing:
        raise InputError(
            f"part {Part(missing[0], counts[0])} is missing. Give all {counts[0]} parts, or make it with "
            f"`crosscoders cache --part {Part(missing[0], counts[0])}`."
        )
    return [by_number[part] for part in sorted(by_number)]


def _require_whole(shards: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    n_shards = -(-plan["n_tokens"] // plan["shard_tokens"])
    n_tokens = sum(shard["n_tokens"] + shard.get("left_out", 0) for shard in shards)
    names = [shard["name"] for shard in shards]
    if names != [shard_name(number) for number in range(n_shards)] or n_tokens != plan["n_tokens"]:
        raise CorruptData(
            f"the parts hold {len(shards)} shards of {n_tokens} tokens, not {n_shards} of {plan['n_tokens']}. "
            "Make the parts again."
        )
