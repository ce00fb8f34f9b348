"""The benchmark `sae-lora`: its documents, its SAEs, and what it makes of two curves."""

from pathlib import Path

import pytest
import torch

from benchmarks import sae_lora_gap
from benchmarks.sae_lora_gap import race, saes, setting
from benchmarks.sae_lora_gap.race import Point
from crosscoders.common import files
from crosscoders.common.results import ResultRecord
from diffing.demo import read_rows
from sae_lora import load_dictionary
from sae_lora.dictionaries.frozen import DictionaryInfo
from sae_lora.lora.adapter import add_lora, choose_layers


def test_training_and_development_documents_are_disjoint_and_all(tmp_path: Path) -> None:
    parts = {name: Path(path).read_text().splitlines() for name, path in setting.split(tmp_path).items()}
    assert len(parts["train"]) + len(parts["development"]) == len(read_rows("raw_train"))
    assert not set(parts["train"]) & set(parts["development"]) and len(parts["development"]) == 1041


@pytest.mark.parametrize(("architecture", "sparsity"), [("topk", 4), ("jumprelu", 0.1)])
def test_a_trained_sae_is_saved_as_it_computes_and_reconstructs(
    architecture: str, sparsity: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6000, 4) @ torch.randn(4, 12) + 3
    sae = saes.make_sae(saes.Design(architecture, sparsity, dict_size=32), 12)
    saes.train_sae(sae, x, 250 * saes.BATCH, tmp_path)
    dictionary = load_dictionary(tmp_path)
    assert dictionary.hook_point == setting.HOOK_POINT
    torch.testing.assert_close(dictionary(x[:50]), sae(x[:50]), rtol=1e-4, atol=1e-4)
    found = saes.quality(dictionary, x)
    assert found.fve[0] > 0.5 and found.n_tokens == 6000
    variance = (x - x.mean(0)).pow(2).sum()
    assert found.fve[0] == pytest.approx(1 - float((x - dictionary(x)).pow(2).sum() / variance), rel=1e-3)


def test_every_fit_has_as_many_weights_as_fit_into_a_twentieth() -> None:
    plan, model = setting.open_base(setting.HELD_OUT, 500)
    limit = 0.05 * sum(weight.numel() for weight in model.parameters())
    one = sum(w.numel() for w in add_lora(model, [0], rank=1, alpha=1.0).parameters() if w.requires_grad)
    for name, design in (saes.DICTIONARIES | saes.SWEPT).items():
        info = DictionaryInfo("sae-lens", "", design.hook_point, 128, design.dict_size, {})
        for prefix, settings in sae_lora_gap.arms_of(name, quick=False).items():
            if "corrector" not in settings:
                layers, rank = choose_layers(settings["layers"], [info], plan.n_layers), settings["rank"]
                assert (one * len(layers) * rank <= limit) == (prefix != "rank_64."), (name, prefix)
                assert one * len(layers) * (rank + 1) > limit or "rank_" in prefix, (name, prefix)


def values_of(found: race.Raced) -> dict[str, float]:
    return {entry["name"]: entry["value"] for entry in found.rows}


def test_the_speedup_counts_pretraining_and_the_first_time_at_the_loss() -> None:
    """The end-to-end SAE is best, 3.8, after 40 s; LoRA gets there at 10 s, 30 s with pretraining."""
    slow = [Point(100, 20.0, 4.0), Point(200, 40.0, 3.8), Point(300, 60.0, 3.9)]
    fast = [Point(100, 5.0, 3.9), Point(200, 10.0, 3.75), Point(300, 15.0, 3.7)]
    found = race.summarise({"end_to_end_1": slow, "lora_after": fast}, 3.5, 4.5, 20.0, n=7)
    values = values_of(found)
    assert values["sae-lora.e2e_speedup.1"] == pytest.approx(40 / 30)
    assert values["sae-lora.e2e_speedup.1.without_pretraining"] == 4 and values["sae-lora.e2e_speedup.1.tokens"] == 1
    assert "sae-lora.race.lora_after.speedup_to_its_best" not in values and not found.left_out  # 3.7 is never reached
    assert values["sae-lora.race.end_to_end_1.200.ce"] == 3.8


def test_an_sae_that_is_there_without_lora_is_compared_by_its_pretraining_alone() -> None:
    slow, fast = [Point(100, 20.0, 4.0)], [Point(100, 5.0, 3.7)]
    values = values_of(race.summarise({"end_to_end_1": slow, "lora_after": fast}, 3.5, 3.9, 8.0, n=7))
    assert values["sae-lora.e2e_speedup.1"] == 2.5 and "sae-lora.e2e_speedup.1.tokens" not in values


def test_every_budget_is_compared_at_its_end_and_the_first_to_a_loss_counts() -> None:
    """A shorter end-to-end training is at 3.7 before a longer one, which ends where no LoRA comes to."""
    curves = {
        "end_to_end_1": [Point(100, 10.0, 4.0), Point(200, 20.0, 3.7)],
        "end_to_end_2": [Point(200, 20.0, 4.0), Point(400, 40.0, 3.6)],
        "lora_all": [Point(100, 5.0, 3.9), Point(200, 10.0, 3.7)],
        "sae_by_kl": [Point(100, 4.0, 3.8), Point(200, 8.0, 3.55)],
    }
    found = race.summarise(curves, 3.5, 4.5, 10.0, n=7)
    values = values_of(found)
    assert values["sae-lora.e2e_speedup.1"] == 1 and values["sae-lora.e2e_speedup.1.without_pretraining"] == 2
    # The SAE trained on by KL comes there, but it is no LoRA.
    assert "sae-lora.e2e_speedup.2" not in values and "3.6000" in found.left_out["sae-lora.e2e_speedup.2"]
    assert values["sae-lora.race.lora_all.speedup_to_its_best"] == 1
    assert values["sae-lora.race.lora_all.speedup_to_its_best.tokens"] == 1
    assert "sae-lora.race.sae_by_kl.speedup_to_its_best" not in values  # no end-to-end SAE comes to 3.55


def test_the_command_keeps_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as command

    monkeypatch.setattr(sae_lora_gap, "run", lambda quick, work: {"name": "sae-lora", "rows": [], "work": str(work)})
    found = command.run_one("sae-lora", quick=True, out=tmp_path, options={})
    assert found["work"] == str(tmp_path / "sae-lora")
    assert files.read_model(tmp_path / "sae-lora-quick.json", ResultRecord)["name"] == "sae-lora"
