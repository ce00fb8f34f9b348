"""Run folder: what a training run leaves behind, and how it goes on after an interruption.

    RUN/run.json              resolved config, environment, hashes of the inputs; written first
    RUN/train.jsonl           one line of metrics per interval
    RUN/step-00001000/        state to resume from: weights, Adam, counters; manifest last; the newest two are kept
    RUN/model.safetensors, config.json, eval.json    the finished crosscoder; their presence means done

A state holds everything that decides what follows: the stream's order is a pure function of (seed, step) and training
draws no random number after the start, so weights, Adam's moments, dead counters and the step are all there is.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import say
from crosscoders.common.records import FileRecord, Named, Record
from crosscoders.training import adam8

FORMAT_VERSION = 1


class CacheInput(Record):
    """What a run records of the activations that it read; without a path where the models ran beside it."""

    path: str | None = None
    hash: str
    hook_point: str
    base: Named
    tuned: Named


class StreamInput(Record):
    """What was measured on the activations when the run began."""

    mean_norm: list[Annotated[float, Field(strict=False)]] | None = None
    """Written as text, since JSON numbers need not keep every bit."""


class Inputs(Record):
    """What a run was made from; a fit has others than these, which are only compared."""

    cache: CacheInput | None = None
    stream: StreamInput = StreamInput()


class RunRecord(Record):
    """run.json"""

    version = FORMAT_VERSION
    format_version: int
    command: str
    config: dict[str, Any]
    inputs: Inputs


class StateRecord(Record):
    """manifest.json of a state."""

    version = FORMAT_VERSION
    again = "go on with the version that wrote it, or choose another --out"
    format_version: int
    step: int = Field(ge=0)
    state: FileRecord


def start_run(
    folder: Path,
    config: Any,
    inputs: dict[str, Any],
    environment: dict[str, Any],
    command: str = "train",
    locations: Sequence[str] = (),
) -> None:
    """Write run.json, or check that the run in the folder is the same one.

    config: a dataclass. A setting that is newer than the recorded run has its default in it, so a default has to mean
    what was done before there was the setting. locations: settings that say where inputs are, which may be elsewhere
    now if their hashes are the same.

    Raises:
        InputError: the folder holds a run with another config or other inputs.
    """
    described = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "config": to_dict(config),
        "environment": environment,
        "inputs": inputs,
    }
    path = folder / "run.json"
    for name in ("manifest.json", "part.json", "progress.json"):
        if (folder / name).is_file():
            raise InputError(f"{folder} holds an activation cache ({name}). Choose another --out.")
    if not path.is_file():
        files.write_json(path, described)
        return
    before = files.read_model(path, RunRecord)
    recorded = {"config": _with_newer(before["config"], config), "inputs": _by_content(before["inputs"])}
    asked = {"config": described["config"], "inputs": _by_content(inputs)}
    recorded, asked = (json.loads(json.dumps(run)) for run in (recorded, asked))
    other_input = _first_difference(recorded["inputs"], asked["inputs"])
    for run in (recorded, asked):
        run["config"] = {k: v for k, v in run["config"].items() if other_input or k not in locations}
    changed = _first_difference(recorded["config"], asked["config"]) or other_input
    if changed:
        key, old, new = changed
        raise InputError(
            f"{folder} holds a run with {key} = {old!r}, now {new!r}. "
            "Use the same settings to go on, or choose another --out."
        )


def _by_content(entry: Any) -> Any:
    """Leave out where what has a hash lies: a cache, a model or a dictionary that was moved is the same one.

    Runs recorded `groups` beside the hash of their cache, which covers it.
    """
    if not isinstance(entry, dict):
        return entry
    return {k: _by_content(v) for k, v in entry.items() if "hash" not in entry or k not in ("path", "name", "groups")}


def _with_newer(was: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the recorded settings, with the defaults of those that are not among them."""
    settings = dict(was)
    for field in fields(config):
        now = getattr(config, field.name)
        if field.name not in settings and field.default is not MISSING:
            settings[field.name] = field.default
        elif is_dataclass(now) and isinstance(settings.get(field.name), dict):
            settings[field.name] = _with_newer(settings[field.name], now)
    return settings


def _first_difference(was: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(was, dict) and isinstance(now, dict):
        for name in [*was, *(n for n in now if n not in was)]:
            difference = _first_difference(was.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if difference:
                return difference
        return None
    return None if was == now else (key, was, now)


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Publish the state of a step, with `others`; the manifest is written last, so a half-written one is never read.

    Of the others, the last whole one before it is kept. One of a later step is damaged: the run would have gone on from
    it. Whether an earlier one is whole is judged by its size, and its checksum when it is read.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            tensors |= adam8.parts(f"adam.{index}.{name}", value)
    tensors |= others or {}
    target = folder / f"step-{step:08d}"
    files.remove_temporary(target)
    written = files.write_tensors(target / "state.safetensors", tensors)
    files.write_json(
        target / "manifest.json", {"format_version": FORMAT_VERSION, "step": step, "state": written._asdict()}
    )
    earlier = [path for path in state_folders(folder) if path < target and _is_of_its_size(path)]
    for other in folder.glob("step-*"):
        if other.is_dir() and other != target and other not in earlier[-1:]:
            shutil.rmtree(other)


def state_folders(folder: Path) -> list[Path]:
    """Return the states of a run that were published, by step."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def _is_of_its_size(path: Path) -> bool:
    try:
        n_bytes = files.read_model(path / "manifest.json", StateRecord)["state"]["n_bytes"]
        return bool((path / "state.safetensors").stat().st_size == n_bytes)
    except (CorruptData, FileNotFoundError):
        return False


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Tensor]] | None:
    """Restore the newest whole state and return its step and other tensors; None where there is none.

    A state that fails its checksum is passed over, with a line that says so.

    Raises:
        InputError: a state has another format version.
    """
    for path in reversed(state_folders(folder)):
        try:
            manifest = files.read_model(path / "manifest.json", StateRecord)
            expected = files.Written(manifest["state"]["n_bytes"], manifest["state"]["checksum"])
            tensors = _tensors_of(path / "state.safetensors", expected)
        except CorruptData as error:
            say(f"warning: {error} Going on from the state before it.")
            continue
        model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value.clone()  # not a view of the file
        state = {index: adam8.joined(entry) for index, entry in entries.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        others = {name: value for name, value in tensors.items() if not name.startswith(("model.", "adam."))}
        return int(manifest["step"]), others
    return None


def _tensors_of(path: Path, expected: files.Written) -> dict[str, Tensor]:
    if not path.is_file():
        raise CorruptData(f"{path} is missing.")
    return files.read_tensors(path, expected)


def cut_log(path: Path, step: int) -> None:
    """Drop lines of train.jsonl beyond `step`, and a torn last line."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # torn, or no line of ours
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    files.write_bytes(path, "".join(lines).encode())
