"""Exports: tables as CSV and Parquet, and Neuronpedia's folder against its published fields and slow routes."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from explorer_runs import explorer_run

from crosscoders import ActivationCache, InputError, load_crosscoder
from crosscoders.common.files import write_json
from diffing import Session
from diffing.cli import main
from diffing.sharing.neuronpedia import model_ids
from diffing.sharing.settings import ExportSettings
from diffing.sharing.tables import read_tables, write_tables

# The columns that utils/neuronpedia-utils/neuronpedia_utils/export-data.py of hijohnnylin/neuronpedia asks for.
FEATURE = (
    "modelId layer index maxActApprox creatorId frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values neuron_alignment_indices neuron_alignment_l1 "
    "neuron_alignment_values correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson "
    "decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName topkCosSimIndices topkCosSimValues "
    "vector vectorLabel hookName vectorDefaultSteerStrength hasVector"
).split()
ACTIVATION = (
    "id modelId layer index creatorId dataSource tokens maxValue minValue values maxValueTokenIndex dfaValues "
    "dfaMaxValue dfaTargetIndex binContains binMin binMax"
).split()
EXPLANATION = (
    "id modelId layer index authorId description embedding typeName explanationModelName umap_x umap_y umap_cluster "
    "umap_log_feature_sparsity"
).split()
# What their database asks for and fills in by no default.
REQUIRED = {
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner", "updatedAt"},
    "release": {"name", "description", "creatorName", "creatorId"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
}


@pytest.fixture(scope="module")
def run(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explorer_run(tmp_path_factory.mktemp("export") / "run", cache_folder)


@pytest.fixture(scope="module")
def exported(run: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "np"
    given = f"--neuronpedia {out} --cache {cache_folder} --source-set ours"
    assert main(["export", str(run), *given.split()]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def rows(exported: Path, model: str, kind: str) -> list[dict[str, Any]]:
    return lines(exported / model / "1-ours" / kind / "batch-0.jsonl.gz")


def test_a_neuronpedia_folder_has_the_published_fields_in_their_order(exported: Path) -> None:
    for kind, fields in (("features", FEATURE), ("activations", ACTIVATION), ("explanations", EXPLANATION)):
        for model in ("base", "tuned"):
            assert all(list(row) == fields for row in rows(exported, model, kind))
    assert len(rows(exported, "base", "features")) == 24


def test_rows_above_the_features_name_each_other_and_all_that_is_required(exported: Path) -> None:
    (model,), (release,), (source_set,), (source,) = (
        lines(exported / "tuned" / "1-ours" / f"{name}.jsonl") for name in REQUIRED
    )
    for name, row in zip(REQUIRED, (model, release, source_set, source), strict=True):
        assert all(row[key] not in (None, "") for key in REQUIRED[name]), name
    assert (source["modelId"], source["setName"], source["id"]) == (model["id"], source_set["name"], "1-ours")
    assert source_set["releaseName"] == release["name"]
    feature = rows(exported, "tuned", "features")[0]
    assert (feature["modelId"], feature["layer"], feature["sourceSetName"]) == ("tuned", "1-ours", "ours")


def test_features_have_the_rates_of_the_table_and_the_histogram_of_a_plain_pass(
    exported: Path, run: Path, cache_folder: Path
) -> None:
    columns = json.loads((run / "latents.json").read_text())["columns"]
    cache = ActivationCache(cache_folder)
    latents = load_crosscoder(run).encode(cache.read(0, len(cache)).activations.float()).detach().double().numpy()
    fires = 0
    for j, feature in enumerate(rows(exported, "base", "features")):
        assert (feature["index"], feature["frac_nonzero"]) == (str(j), columns["frequency"][j])
        values = latents[:, j][latents[:, j] > 0]
        assert sum(feature["freq_hist_data_bar_heights"]) == len(values)
        if len(values):
            fires += 1
            centres = np.array(feature["freq_hist_data_bar_values"])
            mean = (centres * feature["freq_hist_data_bar_heights"]).sum() / len(values)
            assert mean == pytest.approx(values.mean(), abs=values.max() / 80 + 1e-4)  # half a bin
    assert fires > 10


def test_logits_are_those_of_each_models_own_head(exported: Path, run: Path, cache_folder: Path) -> None:
    session = Session(run, cache_folder)
    for name, model in zip(("base", "tuned"), session.pair.models, strict=True):
        feature = next(row for row in rows(exported, name, "features") if row["hasVector"])
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(torch.tensor(feature["vector"])))
            cap = model.config.final_logit_softcapping
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
        ordered = logits[: len(session.info.tokenizer)].sort().values
        assert feature["neg_values"] == pytest.approx(ordered[:10].tolist(), abs=1e-3)
        assert feature["pos_values"] == pytest.approx(ordered.flip(0)[:10].tolist(), abs=1e-3)
        assert sum(feature["logits_hist_data_bar_heights"]) == len(ordered)


def test_activations_are_the_examples_of_the_run(exported: Path, run: Path) -> None:
    examples = json.loads((run / "examples.json").read_text())["latents"]
    written = rows(exported, "tuned", "activations")
    assert len(written) == sum(map(len, examples.values())) == len({row["id"] for row in written})
    for row in written:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert any(row["tokens"] == example["tokens"] for example in examples[row["index"]])


def test_an_explanation_is_the_name_of_the_latent_or_says_where_it_fires(exported: Path) -> None:
    for row in rows(exported, "base", "explanations"):
        assert "of its activation on" in row["description"]


def test_models_of_one_name_get_ids_of_their_own() -> None:
    assert model_ids(("google/Gemma-3.1", "me/gemma 3 chat")) == ["gemma-3-1", "gemma-3-chat"]
    assert model_ids(("/a/model", "/b/model")) == ["model-base", "model-tuned"]


def test_every_table_of_a_run_is_written_and_reads_back(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--csv", str(tmp_path / "c"), "--parquet", str(tmp_path / "p")]) == 0
    columns = json.loads((run / "latents.json").read_text())["columns"]
    for table in (pandas.read_csv(tmp_path / "c" / "latents.csv"), pandas.read_parquet(tmp_path / "p/latents.parquet")):
        assert list(table.columns) == list(columns)
        assert table["nu_error"].tolist() == pytest.approx(columns["nu_error"], nan_ok=True)
        assert table["verdict"].tolist() == columns["verdict"]
    examples = pandas.read_csv(tmp_path / "c" / "examples-latents.csv", keep_default_na=False)
    listed = json.loads((run / "examples.json").read_text())["latents"]
    assert json.loads(examples["tokens"][0]) == listed[str(examples["latent"][0])][0]["tokens"]
    assert len(pandas.read_parquet(tmp_path / "p" / "positions-shares.parquet")) == 24


def test_tables_are_found_by_their_shape(tmp_path: Path) -> None:
    run = tmp_path / "run"
    row = {"name": "a.b", "value": None, "unit": "nats", "n": 3, "low": None, "high": None}
    says = {"config": {"x": 1}, "rows": [row], "phrases": {"tuned": [{"phrase": "é\ud800", "z": 2.0}], "base": []}}
    write_json(run / "replies.json", says)
    write_json(run / "interpretation.json", {"latents": {"7": {"name": None, "predictors": [{"d": 1}]}}})
    write_json(run / "topk" / "sets.json", {"rows": [row], "sets": {"hi": [["m", 3]]}})
    write_json(run / "adapter" / "x.json", {"rows": [row]})
    (run / "topk" / "directions.parquet").parent.mkdir(exist_ok=True)
    pandas.DataFrame({"rate": [0.5]}).to_parquet(run / "topk" / "directions.parquet")
    (run / "train.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    tables = read_tables(run)
    assert {name: len(table) for name, table in tables.items()} == {
        "interpretation-latents": 1, "replies": 1, "replies-phrases": 1, "topk.directions": 1, "topk.sets": 1,
        "train": 1,
    }  # fmt: skip
    assert tables["replies-phrases"].to_dict("records") == [{"of": "tuned", "phrase": "é?", "z": 2.0}]
    for kind in ("csv", "parquet"):
        write_tables(tables, tmp_path / kind, kind)
    assert pandas.read_csv(tmp_path / "csv" / "replies-phrases.csv")["phrase"][0] == "é?"
    assert json.loads(pandas.read_parquet(tmp_path / "parquet/interpretation-latents.parquet")["predictors"][0])


def test_a_wrong_export_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for given, said in (
        ({}, "nothing to write"),
        ({"csv": str(tmp_path / "full")}, "holds something"),
        ({"neuronpedia": "n", "source_set": "a b"}, "source_set is 'a b'"),
        ({"csv": str(tmp_path / "full" / "x")}, "is a file"),
    ):
        with pytest.raises(InputError, match=said):
            ExportSettings("run", **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no table yet"):
        read_tables(tmp_path / "full")
