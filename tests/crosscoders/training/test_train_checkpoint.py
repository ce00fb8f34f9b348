"""A run goes on where it broke, to the same checkpoint; another run in its folder is refused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import activations, config, run, weights

from crosscoders import (
    CrosscoderConfig,
    EnvironmentFault,
    InputError,
    TrainConfig,
    evaluate,
    load_crosscoder,
)
from crosscoders.common import files


def run_with_a_break(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    settings: TrainConfig | None = None,
    **given: torch.Tensor,
) -> None:
    """Break at a step, then run again."""
    import crosscoders.training.loop as module

    calls, real = [], module.forward

    def breaking(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "forward", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(folder, settings, **given)
    assert not (folder / "model.safetensors").exists()
    monkeypatch.setattr(module, "forward", real)
    run(folder, settings, **given)


@pytest.mark.parametrize("kill_at", [15, 20, 38])
def test_a_run_that_breaks_anywhere_goes_on_to_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    run(tmp_path / "whole")
    run_with_a_break(tmp_path / "broken", monkeypatch, kill_at)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    for name in ("step", "loss", "fve_tuned"):
        logs = [[json.loads(line).get(name) for line in (tmp_path / n / "train.jsonl").read_text().splitlines()]
                for n in ("whole", "broken")]  # fmt: skip
        assert logs[0] == logs[1]


def test_8_bit_moments_train_as_well_and_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shape = activations(d_model=128), CrosscoderConfig(dict_size=64, k=3)
    settings = config(crosscoder=shape, n_tokens=1920)
    run(tmp_path / "32", settings, x)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the runs
        run(tmp_path / "8", replace(settings, adam_bits=8), x)
        run_with_a_break(tmp_path / "broken", monkeypatch, 35, replace(settings, adam_bits=8), x=x)
    assert weights(tmp_path / "8") == weights(tmp_path / "broken") != weights(tmp_path / "32")
    fve = [evaluate(load_crosscoder(tmp_path / n), x.split(100)).fve for n in ("32", "8")]
    assert min(fve[0]) > 0.9 and fve[1] == pytest.approx(fve[0], abs=0.01)
    # Weights of 4 bytes, two moments of 4 and of 1.
    size = [(tmp_path / n / "step-00000060" / "state.safetensors").stat().st_size for n in ("32", "8")]
    assert size[1] / size[0] == pytest.approx(6 / 12, abs=0.1)


TESTS = str(Path(__file__).parents[2])
SLOW_CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import time, torch; torch.set_num_threads(1)
import crosscoders.training.loop as module
from training_runs import run
from pathlib import Path
real, calls = module.forward, []
def slow(*args, **named):
    calls.append(1)
    if len(calls) == 25: print("ready", flush=True)
    if len(calls) > 25: time.sleep(0.05)
    return real(*args, **named)
module.forward = slow
try:
    run(Path(sys.argv[2]))
except module.StopRequested as stop:
    sys.exit(stop.exit_status)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_or_asked_to_stop_goes_on_to_the_same_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run(tmp_path / "whole")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHILD, TESTS, str(tmp_path / "killed")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, number)
    assert child.wait() == (-9 if number == signal.SIGKILL else 143)
    child.stdout.close()
    states = sorted(p.parent.name for p in (tmp_path / "killed").glob("step-*/manifest.json"))
    assert states[-1] == "step-00000020" if number == signal.SIGKILL else states[-1] > "step-00000020"
    run(tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "whole")
    folder = tmp_path / "whole"
    before = weights(folder)
    state = folder / "step-00000040" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    (folder / "config.json").unlink()
    run(folder)
    assert weights(folder) == before
    assert "Going on from the state before it" in capsys.readouterr().err


def test_only_the_last_two_states_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").glob("step-*")) == ["step-00000030", "step-00000040"]


def test_another_config_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(InputError, match=r"holds a run with lr = 0.01, now 0.02. Use the same settings"):
        run(tmp_path / "a", config(lr=2e-2))


def test_a_run_from_before_a_setting_goes_on_where_that_has_its_default(tmp_path: Path) -> None:
    run(tmp_path / "a")
    path = tmp_path / "a" / "run.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["adam_bits"], recorded["config"]["crosscoder"]["activation"]
    files.write_json(path, recorded)
    (tmp_path / "a" / "config.json").unlink()
    run(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").is_file()
    with pytest.raises(InputError, match="holds a run with adam_bits = 32, now 8"):
        run(tmp_path / "a", config(adam_bits=8))


def test_a_second_writer_of_a_run_is_refused(tmp_path: Path) -> None:
    with files.exclusive(tmp_path / "a"), pytest.raises(EnvironmentFault, match="is being written by process"):
        run(tmp_path / "a")
