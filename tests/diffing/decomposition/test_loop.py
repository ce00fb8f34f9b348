"""Training goes on bit-identically, the adversary climbs, and what is saved is what was trained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decompositions import RecordedModel, RecordedTask
from torch import Tensor

from crosscoders.common.errors import CorruptData, InputError
from diffing.decomposition.build import fresh, whole_weights
from diffing.decomposition.loop import Problem, annealed, fresh_adversary, generator_of, left_out, rate, train, warm_up_
from diffing.decomposition.saving import load_, read_description, save
from diffing.decomposition.settings import DecompositionConfig


def batch_of(step: int) -> Tensor:
    return torch.randint(9, (3, 4), generator=generator_of(7, step))


def problem_of(config: DecompositionConfig, **settings: Any) -> Problem:
    model = RecordedModel()
    decomposition = fresh(model, whole_weights(model, ["a", "b"]), config, **settings)
    return Problem(decomposition, RecordedTask(), batch_of, (3, 4))


def config(**settings: Any) -> DecompositionConfig:
    return DecompositionConfig(**({"components": 5, "hidden": 3, "steps": 6, "warmup_steps": 3} | settings))


@pytest.mark.parametrize("network", ["scalar", "shared"])
def test_a_run_that_was_stopped_goes_on_bit_identically_with_its_adversary(
    tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(network=network, adversary_lr=0.2)
    whole, stopped = problem_of(settings), problem_of(settings)
    expected = train(whole, settings)

    def stop_at_5(step: int) -> Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return batch_of(step)

    with pytest.raises(KeyboardInterrupt):
        train(stopped._replace(batch_of=stop_at_5), settings, tmp_path, save_every=3)
    resumed = problem_of(settings)
    adversary = train(resumed, settings, tmp_path, save_every=3)
    for name, tensor in whole.decomposition.state_dict().items():
        assert torch.equal(resumed.decomposition.state_dict()[name], tensor), name
    for name, tensor in expected.state().items():
        assert torch.equal(adversary.state()[name], tensor), name
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [*range(1, 7)]


def test_sources_stay_in_zero_to_one_and_move_at_every_ascent() -> None:
    settings = config(adversary_lr=0.5)
    problem = problem_of(settings)
    before, after = fresh_adversary(problem, settings), train(problem, settings)
    for name, source in after.sources.items():
        assert bool(((source >= 0) & (source <= 1)).all()) and not torch.equal(source, before.sources[name])
    assert after.t == settings.steps * (settings.adversary_steps + 1)


def test_the_warm_up_brings_the_remainder_down() -> None:
    settings = config(warmup_steps=100)
    problem = problem_of(settings, is_relative=True)._replace(is_relative=True)
    before = float(left_out(problem).detach())
    warm_up_(problem, settings)
    assert float(left_out(problem).detach()) < 0.05 * before


def test_schedules_start_and_end_where_they_say() -> None:
    assert [annealed(2.0, 0.4, step, 100) for step in (0, 50, 100, 101)] == pytest.approx([2.0, 1.2, 0.4, 0.4])
    settings = config(steps=101, lr=1e-3, lr_end=0.1)
    assert [rate(settings, step) for step in (0, 50, 100)] == pytest.approx([1e-3, 5.5e-4, 1e-4])


def test_the_schedules_equal_the_recorded() -> None:
    from decompositions import recorded

    values = recorded("09")
    steps = values["anneal_step"].tolist()
    assert [annealed(2.0, 0.4, s, 100) for s in steps] == pytest.approx(values["anneal_p_total100_2.0_to_0.4"].tolist())
    settings = config(steps=100, lr=5e-5, lr_end=0.1)
    (name,) = [name for name in values if name.endswith("nowarm")]
    assert [rate(settings, s) for s in values["cosine_step"].tolist()] == pytest.approx(values[name].tolist(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_before_its_step() -> None:
    settings = config(steps=2, warmup_steps=0)
    problem = problem_of(settings)._replace(reference=0.0)
    before = {name: tensor.clone() for name, tensor in problem.decomposition.state_dict().items()}
    with pytest.raises(CorruptData, match=r"the loss is (inf|nan) at step 0\. Lower lr, now 0\.003\."):
        train(problem, settings)
    assert all(torch.equal(problem.decomposition.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_saved_decomposition_comes_back_and_holds_no_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = config()
    problem = problem_of(settings)
    train(problem, settings)
    save(problem.decomposition, tmp_path, settings, {"base": "x"})
    assert read_description(tmp_path) == (settings, {"base": "x"})
    other = problem_of(config(seed=4)).decomposition
    load_(other, tmp_path)
    for name, tensor in problem.decomposition.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "decomposition.safetensors").items()}
    assert {"site/a/V": (5, 5), "site/a/U": (5, 7), "site/b/V": (7, 5), "site/b/U": (5, 8)}.items() <= shapes.items()
    assert {name.split("/")[0] for name in shapes} == {"site", "network"}


def test_a_decomposition_that_is_not_there_or_has_other_sites_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("there is no decomposition.json. Run diffing decompose first.")):
        read_description(tmp_path)
    settings = config()
    save(problem_of(settings).decomposition, tmp_path, settings, {})
    model = RecordedModel()
    with pytest.raises(InputError, match=re.escape("has the sites ['a', 'b'], the model ['a']")):
        load_(fresh(model, whole_weights(model, ["a"]), settings), tmp_path)
    with pytest.raises(CorruptData, match="does not fit its models"):
        load_(problem_of(config(components=6)).decomposition, tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
    ({"components": 0}, "components is 0; give a number above 0."),
    ({"stochastic": 0, "adversarial": 0}, "stochastic and adversarial are both 0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DecompositionConfig(**settings)
