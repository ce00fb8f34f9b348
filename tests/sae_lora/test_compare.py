"""Classes of predictions, stability of latents and several runs in one table: independent routes, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from fits import Identity, archive, opened
from torch import Tensor

from crosscoders.common.statistics import wilson
from crosscoders.models import hooks, predictions
from sae_lora import FitConfig, fit
from sae_lora.cli import main
from sae_lora.evaluation import ablation, cells, tables
from sae_lora.evaluation.classes import TokenClasses
from sae_lora.fitting.correctors import start

D, F = 16, 24
POINT = "blocks.1.hook_resid_post"
SPECIAL = torch.tensor([0, 1, 2])


def write_scope(root: Path, seed: int = 0, layer: int = 1) -> Path:
    folder = root / "gemma-scope-2b-pt-res" / f"layer_{layer}" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    W_dec = np.random.default_rng(seed).normal(size=(F, D)) / D**0.5
    arrays = {"W_enc": W_dec.T, "W_dec": W_dec, "b_enc": np.full(F, -0.5), "b_dec": np.zeros(D)}
    arrays["threshold"] = np.full(F, 0.1)
    np.savez(folder / "params.npz", **{name: value.astype(np.float32) for name, value in arrays.items()})
    return folder


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scope(tmp_path_factory.mktemp("hub"))


def config(pair: Any, scope: Path, **changes: object) -> FitConfig:
    settings: dict[str, object] = {
        "model": pair.tuned, "dictionary": str(scope), "data": pair.data, "n_tokens": 600, "context_length": 40,
        "batch_rows": 8, "lr": 1e-2, "log_every": 2, "checkpoint_every": 20,
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})  # type: ignore[arg-type]


def lora(settings: FitConfig, std: float) -> Any:
    """Plan, a fit whose LoRA on all layers is random, dictionaries, batches."""
    plan, model, dictionaries, batches = opened(settings)
    fitted = start(settings, model, dictionaries, [0, 1, 2])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in fitted.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(std * torch.randn(weight.shape, generator=draw))
    return plan, fitted, dictionaries, batches


def sequences(plan: Any) -> list[Tensor]:
    ids = [plan.rows.ids[a:b] for a, b in zip(plan.rows.offsets[:-1], plan.rows.offsets[1:], strict=True)]
    return [torch.from_numpy(one).long()[None] for one in ids]


# ---------------------------------------------------------------------------------------------------------- cells


def test_a_corrector_of_the_dictionary_costs_nothing_while_it_is_off(pair: Any, scope: Path) -> None:
    settings = config(pair, scope, corrector="mean-scale", n_tokens=300)
    plan, model, (dictionary,), batches = opened(settings)
    fitted = start(settings, model, [dictionary], [])
    with torch.no_grad():
        fitted.dictionaries[0].shift.normal_()  # type: ignore[union-attr,operator]
    n = len(plan.rows.offsets) - 1
    found = cells.measure(model, [dictionary], lambda: iter(batches), n, plan.keep_ids, corrected=fitted.dictionaries)
    cell = {name: found.sums[i] for i, name in enumerate(cells.CELLS)}
    assert np.array_equal(cell["adapted"], cell["plain"])
    shift = fitted.dictionaries[0].shift
    for i in (0, n - 1):
        ids = sequences(plan)[i]
        kept = torch.isin(ids, SPECIAL)[..., None]
        for name, by in (("spliced", 0.0), ("adapted_spliced", shift)):

            def edit(x: Tensor, by: Any = by, kept: Tensor = kept) -> Tensor:
                return torch.where(kept, x, dictionary(x.flatten(0, 1)).view_as(x) + by)

            with torch.no_grad(), hooks.replace(model, POINT, edit):
                loss = model(input_ids=ids, labels=ids).loss
            np.testing.assert_allclose(cell[name][0, i], float(loss) * (ids.shape[1] - 1), rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- classes


def test_classes_split_the_predictions_and_their_sums(pair: Any, scope: Path) -> None:
    plan, fitted, dictionaries, batches = lora(config(pair, scope, n_tokens=1420), 0.02)
    n, classes = len(plan.rows.offsets) - 1, TokenClasses(plan.rows)
    found = cells.measure(fitted.model, dictionaries, lambda: iter(batches), n, plan.keep_ids, classes=classes)
    for kind in ("position", "frequency", "role"):
        parts = [part for name, part in found.classes.items() if name.startswith(kind)]
        assert len(parts) >= 2 and all(part.n_tokens.sum() > 0 for part in parts)
        np.testing.assert_array_equal(sum(part.n_tokens for part in parts), found.n_tokens)
        np.testing.assert_allclose(sum(part.sums for part in parts), found.sums, rtol=1e-9, atol=1e-9)
    assert {"role.text", "role.template", "role.user", "role.assistant"} <= found.classes.keys()
    np.testing.assert_array_equal(found.classes["position.first_9"].n_tokens, np.minimum(found.n_tokens, 9))
    ids, counts = np.unique(plan.rows.ids[plan.rows.scored], return_counts=True)
    common = set(ids[np.isin(ids, classes.common)].tolist())
    assert counts[np.isin(ids, classes.common)].min() >= counts[~np.isin(ids, classes.common)].max()
    share = counts[np.isin(ids, classes.common)].sum() / counts.sum()
    assert 0.5 <= share < 0.5 + counts.max() / counts.sum()
    for i, one in list(enumerate(sequences(plan)))[-3:]:  # by hand
        with torch.no_grad(), fitted.model.disable_adapter():
            log_q = fitted.model(input_ids=one).logits[0, :-1].log_softmax(-1)
        ce = -log_q.gather(1, one[0, 1:, None])[:, 0].double().numpy()
        roles = plan.rows.roles[plan.rows.offsets[i] + 1 : plan.rows.offsets[i + 1]]
        marks = {"position.later": np.arange(len(ce)) >= 9, "role.template": roles == 1}
        marks["frequency.common"] = np.array([int(token) in common for token in one[0, 1:]])
        for name, mark in marks.items():
            np.testing.assert_allclose(found.classes[name].sums[0, 0, i], ce[mark].sum(), rtol=1e-4, atol=1e-5)
    rows = {row["name"]: row for row in cells.eval_rows(found)}
    assert rows["eval.role.template.kl.adapted"]["n"] == found.classes["role.template"].n_tokens.sum()
    text = tables.eval_summary(list(rows.values()))
    assert "role.template" in text and text.count("drift (dictionary off)") == 2


# ------------------------------------------------------------------------------------------------------ stability


def test_effects_equal_a_plain_loop_over_single_sequences(pair: Any, scope: Path) -> None:
    plan, fitted, (dictionary,), batches = lora(config(pair, scope, n_tokens=500), 0.05)
    latents = [3, 8, 20]
    found = ablation.effects(fitted, [dictionary], POINT, latents, iter(batches), plan.keep_ids)
    wanted, n_firing = np.zeros((2, 3)), np.zeros(3)
    for one in sequences(plan):
        kept = torch.isin(one, SPECIAL)[..., None]

        def edit(x: Tensor, without: int | None, kept: Tensor = kept) -> Tensor:
            latents = dictionary.encode(x.flatten(0, 1))
            if without is not None:
                latents[:, without] = 0
            return torch.where(kept, x, dictionary.decode(latents).view_as(x))

        def run(without: int | None, one: Tensor = one, edit: Any = edit) -> Tensor:
            with hooks.replace(fitted.model, POINT, lambda x: edit(x, without)):
                return predictions.log_probs(fitted.model(input_ids=one).logits[0, :-1])

        with torch.no_grad(), fitted.model.disable_adapter(), hooks.capture(fitted.model, [POINT]) as seen:
            fitted.model(input_ids=one)
        used = seen[POINT][~kept[..., 0]]
        distance = (used @ dictionary.W_enc + dictionary.b_enc - dictionary.threshold)[:, latents]
        assert float(distance.abs().min()) > 1e-5  # a batch of another shape counts the same tokens
        fires = (dictionary.encode(used) > 0).sum(dim=0)
        for j, latent in enumerate(latents):
            if fires[latent]:
                n_firing[j] += int(fires[latent])
                with torch.no_grad(), fitted.model.disable_adapter():
                    wanted[0, j] += float(predictions.kl(run(None), run(latent)).sum())
                with torch.no_grad():
                    wanted[1, j] += float(predictions.kl(run(None), run(latent)).sum())
    assert n_firing.min() > 0 and abs(wanted[0] - wanted[1]).min() > 0
    np.testing.assert_array_equal(found.n_firing, n_firing)
    np.testing.assert_allclose(found.kl[0], wanted, rtol=2e-3, atol=1e-5)


def test_a_dictionary_of_another_width_beside_it_changes_no_effect(pair: Any, tmp_path: Path) -> None:
    point, width = "blocks.2.attn.hook_z", D + 8
    make_model(tmp_path / "model", seed=3, d_model=width)
    make_tokenizer(tmp_path / "model")
    wanted = config(
        pair, archive(tmp_path / "params.npz"), model=str(tmp_path / "model"), hook_point=point, n_tokens=400
    )
    plan, fitted, (dictionary,), batches = lora(wanted, 0.05)
    wide = Identity()
    wide.info = replace(wide.info, d_model=width)
    both, alone = (
        ablation.effects(fitted, dictionaries, point, [3, 8, 20], iter(batches), plan.keep_ids)
        for dictionaries in ([wide, dictionary], [dictionary])
    )
    np.testing.assert_allclose(both.kl, alone.kl, rtol=1e-4, atol=1e-6)
    assert (alone.n_firing[:2] > 0).all() and alone.kl[:, 0, :2].min() > 0


def test_an_adapter_that_changes_nothing_changes_no_effect_and_no_rate(pair: Any, scope: Path) -> None:
    plan, fitted, dictionaries, batches = lora(config(pair, scope, n_tokens=400), 0.0)
    latents = [0, 8, 12, 20]
    found = ablation.effects(fitted, dictionaries, POINT, latents, iter(batches), plan.keep_ids)
    assert np.array_equal(found.kl[:, 0], found.kl[:, 1]) and (found.kl > 0).all()
    rows = {row["name"].removeprefix(f"eval.effects.{POINT}."): row for row in ablation.effect_rows(POINT, found)}
    assert rows["ratio"]["value"] == rows["ratio"]["low"] == rows["random.ratio"]["high"] == 1
    assert rows["halved"]["value"] == 0 and rows["halved"]["n"] == len(latents)


def test_a_corrector_that_ignores_the_dictionary_leaves_no_effect(pair: Any, scope: Path) -> None:
    settings = config(pair, scope, corrector="mean-scale", n_tokens=400)
    plan, model, dictionaries, batches = opened(settings)
    fitted = start(settings, model, dictionaries, [])
    with torch.no_grad():
        fitted.dictionaries[0].scale.fill_(-1.0)  # type: ignore[union-attr,operator]
    found = ablation.effects(fitted, dictionaries, POINT, [2, 5], iter(batches), plan.keep_ids)
    rows = {
        row["name"].removeprefix(f"eval.effects.{POINT}."): row["value"] for row in ablation.effect_rows(POINT, found)
    }
    assert rows["before"] > 1e-5 and rows["after"] == rows["ratio"] == 0 and rows["halved"] == 1


def test_the_random_push_is_as_long_as_what_the_ablation_takes(pair: Any, scope: Path) -> None:
    _, _, (dictionary,), _ = opened(config(pair, scope))
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1)) * 3
    ablating = ablation.Ablating(dictionary)
    ablating.which = torch.tensor([0, 1, 2, 3, 4])
    latents = dictionary.encode(x)
    taken = latents[torch.arange(5), ablating.which][:, None] * dictionary.state_dict()["W_dec"][:5]
    assert (taken.norm(dim=1) > 0).any()
    torch.testing.assert_close(dictionary(x) - ablating(x), taken, rtol=1e-4, atol=1e-5)
    ablating.directions = torch.nn.functional.normalize(torch.ones(5, D))
    pushed = dictionary(x) - ablating(x)
    torch.testing.assert_close(pushed.norm(dim=1), taken.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_rates_on_paper() -> None:
    """Rates of 5 latents before and after: one doubles and a bit, one dies, one is too rare to judge."""
    before, after = torch.tensor([100, 10, 40, 9, 0]), torch.tensor([100, 21, 0, 3, 0])
    rows = {row["name"].removeprefix("eval.rates.p."): row for row in ablation.rate_rows("p", before, after)}
    assert rows["changed"]["n"] == 3 and rows["changed"]["value"] == pytest.approx(2 / 3)
    assert (rows["changed"]["low"], rows["changed"]["high"]) == wilson(2, 3)
    assert rows["correlation"]["n"] == 4
    assert rows["correlation"]["value"] == pytest.approx(np.corrcoef([100, 10, 40, 9], [100, 21, 0, 3])[0, 1])
    same = {row["name"].removeprefix("eval.rates.p."): row for row in ablation.rate_rows("p", before, before)}
    assert same["correlation"]["value"] == pytest.approx(1) and same["changed"]["value"] == 0
    assert ablation.choose_latents(before, 2, 0) == ablation.choose_latents(before, 2, 0)
    assert ablation.choose_latents(before, 9, 0) == [0, 1, 2]


# --------------------------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def runs(pair: Any, scope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    fit(config(pair, scope, rank=4, n_tokens=400), root / "lora")
    fit(config(pair, scope, corrector="affine", n_tokens=400), root / "affine")
    fit(config(pair, scope, rank=4, n_tokens=400, control="noise"), root / "noise")
    return root


def test_compare_says_what_eval_says_of_each_run(
    pair: Any, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", pair.data, "--n-tokens", "300", "--context-length", "40", "--json"]
    names = ["lora", "affine", "noise"]
    assert main(["compare", *(str(runs / name) for name in names), *common, "--out", str(tmp_path / "c.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "c.json").read_text())["rows"] == printed["rows"]
    found = {row["name"].removeprefix("compare."): row for row in printed["rows"]}
    columns = {
        "gap": "ce_gap.spliced", "gap_left": "ce_gap.adapted_spliced", "gap_closed": "gap_closed",
        "kl": "kl.spliced", "kl_left": "kl.adapted_spliced", "kl_closed": "kl_closed", "ce_drift": "ce_gap.adapted",
        "kl_drift": "kl.adapted", "weights": "weights",
    }  # fmt: skip
    left = {}
    for name in names:
        assert main(["eval", str(runs / name), *common, *(["--stability", "3"] if name != "noise" else [])]) == 0
        alone = {row["name"].removeprefix("eval."): row for row in json.loads(capsys.readouterr().out)["rows"]}
        left[name] = alone["kl.adapted_spliced"]["value"]
        for key, same in columns.items():
            if same in alone:  # no share where there is no gap
                for part in ("value", "n", "low", "high"):
                    assert found[f"{name}.{key}"][part] == alone[same][part], (name, key)
        assert (f"effects.{POINT}.ratio" in alone) == (name != "noise")
        assert alone[f"rates.{POINT}.changed"]["value"] == 0  # nothing below the dictionary was trained
    assert found["affine.weights"]["value"] == D * D + D and found["affine.kl_drift"]["value"] == 0
    assert found["lora.minus_first"]["value"] == found["lora.minus_first"]["high"] == 0
    assert found["affine.minus_first"]["value"] == pytest.approx(left["affine"] - left["lora"])
    assert main(["compare", *(str(runs / name) for name in names), *common[:-1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split()[:2] for line in lines if line and not line.startswith(("run", "  "))]
    assert heads[1:] == [["lora", "lora"], ["affine", "affine"], ["noise", "lora"]] * 3


def test_runs_that_are_not_comparable_are_refused_in_one_line(
    pair: Any, scope: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_scope(tmp_path / "hub", seed=1)
    fit(config(pair, other, rank=4, n_tokens=400), tmp_path / "other")
    fit(config(pair, scope, rank=4, n_tokens=300), tmp_path / "shorter")
    data = ["--data", pair.data, "--n-tokens", "100"]
    for flags, said in (
        (["compare", str(runs / "lora"), str(tmp_path / "other"), *data], "differ in dictionary"),
        (["compare", str(runs / "lora"), str(tmp_path / "shorter"), *data], "differ in training tokens"),
        (["compare", str(runs / "lora"), str(runs / "lora"), *data], "different folder names"),
        (["eval", str(runs / "noise"), *data, "--stability", "4"], "control 'noise' has none"),
        (["eval", str(runs / "lora"), *data, "--stability", "-1"], "stability"),
    ):
        assert main(flags) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_compared_with_itself_differs_by_nothing_in_every_resample(pair: Any, scope: Path) -> None:
    plan, fitted, dictionaries, batches = lora(config(pair, scope, n_tokens=300), 0.05)
    n = len(plan.rows.offsets) - 1
    measured = cells.measure(fitted.model, dictionaries, lambda: iter(batches), n, plan.keep_ids)
    rows = {r["name"]: r for r in tables.comparison_rows({"a": measured, "b": measured}, {"a": 1, "b": 2})}
    row = rows["compare.b.minus_first"]
    assert row["value"] == row["low"] == row["high"] == 0 and rows["compare.b.weights"]["value"] == 2
