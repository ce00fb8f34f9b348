"""Which states of a run stay, over any order of writes, kills and damage, and which one it goes on from."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from crosscoders import InputError
from crosscoders.common import files
from crosscoders.training.checkpoint import load_state, save_state


def save(folder: Path, step: int) -> None:
    """Write the state of a step, whose weights are the step."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    save_state(folder, step, model, torch.optim.Adam(model.parameters()))


def load(folder: Path) -> int:
    """Return the step of the state that is restored, 0 for none; its weights are checked."""
    model = nn.Linear(3, 2)
    restored = load_state(folder, model, torch.optim.Adam(model.parameters()))
    assert restored is None or (model.weight == restored[0]).all()
    return restored[0] if restored else 0


def steps(folder: Path) -> list[int]:
    """Return the steps of all folders, published or not."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def flip(path: Path) -> None:
    """Change one bit of the weights; the size stays."""
    data = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cut(path: Path) -> None:
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-3])


def lose(path: Path) -> None:
    (path / "state.safetensors").unlink()


def garble(path: Path) -> None:
    (path / "manifest.json").write_text("{")


DAMAGE: list[Callable[[Path], None]] = [flip, cut, lose, garble]


def kill_while_writing(folder: Path, step: int) -> None:
    """Leave what a killed writer leaves: no manifest, and temporary files of safetensors and ours."""
    path = folder / f"step-{step:08d}"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    (path / ".tmpG3MBfg").write_bytes(b"half")
    (path / ".state.safetensors.tmp-77").write_bytes(b"half")


@pytest.mark.parametrize("seed", range(30))
def test_the_newest_whole_state_survives_any_order_of_writes_kills_and_damage(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    damage_at: dict[int, str] = {}
    step = 0
    for _ in range(25):
        event = draw.choice(["write", "write", "kill", "damage", "damage"])
        if event == "write":
            step += 10
            save(tmp_path, step)
            before = [s for s, how in damage_at.items() if s < step and how in ("", "flip")]
            damage_at = {s: damage_at[s] for s in sorted(before)[-1:]} | {step: ""}
            assert steps(tmp_path) == sorted(damage_at)
            assert not list(tmp_path.rglob(".*tmp*"))
        elif event == "kill":
            kill_while_writing(tmp_path, step + 10)
            damage_at.pop(step + 10, None)
        elif any(not how for how in damage_at.values()):
            hit, act = draw.choice([s for s, how in damage_at.items() if not how]), draw.choice(DAMAGE)
            act(tmp_path / f"step-{hit:08d}")
            damage_at[hit] = act.__name__
        if event != "write" or draw.random() < 0.5:  # the run ends here and goes on
            step = load(tmp_path)
            assert step == max((s for s, how in damage_at.items() if not how), default=0)


def test_a_state_written_after_all_were_damaged_is_kept_and_the_damaged_ones_go(tmp_path: Path) -> None:
    for step in (30, 40):
        save(tmp_path, step)
        flip(tmp_path / f"step-{step:08d}")
    assert load(tmp_path) == 0 and steps(tmp_path) == [30, 40], "they stay until a good one stands"
    save(tmp_path, 10)
    assert steps(tmp_path) == [10]
    save(tmp_path, 20)
    assert steps(tmp_path) == [10, 20] and load(tmp_path) == 20


def test_a_state_of_another_format_version_is_an_error_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = tmp_path / "step-00000010" / "manifest.json"
    files.write_json(path, json.loads(path.read_text()) | {"format_version": 2})
    with pytest.raises(InputError, match=r"has format_version 2; this version reads 1. Go on with the version that"):
        load(tmp_path)
    assert path.is_file()


def test_a_folder_loses_stale_temporary_files_to_its_next_writer_and_nothing_else(tmp_path: Path) -> None:
    stale = [".tmpG3MBfg", ".model.safetensors.tmp-4711"]
    others = [".tmp", ".tmpfile.txt", ".hidden", "a.tmp-1", "model.safetensors"]
    for name in stale + others:
        (tmp_path / name).write_bytes(b"x")
    with files.exclusive(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".lock"])
