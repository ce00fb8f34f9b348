"""`diffing decompose` on small language models: the whole change, a LoRA in factored form, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from crosscoders.common.errors import InputError
from crosscoders.models.loading import load_model
from diffing.decomposition.build import fresh
from diffing.decomposition.command import decompose
from diffing.decomposition.graph import Edge, Graph, Node, draw, prompt_graph
from diffing.decomposition.language import deltas_of
from diffing.decomposition.saving import load_, read_description
from diffing.decomposition.settings import DecomposeSettings
from diffing.decomposition.sites import Masks, find_sites, matrix
from diffing.demo import document_file, model_folder

SITES = ["*layers.[13].*q_proj", "*layers.3.mlp.down_proj"]


def settings(out: Path, **changes: Any) -> DecomposeSettings:
    return DecomposeSettings(**({
        "base": str(model_folder("base")), "tuned": str(model_folder("tuned")), "out": str(out), "sites": SITES,
        "data": str(document_file("dialogues_train")), "n_tokens": 600, "batch_rows": 4, "context_length": 32,
        "components": 3, "hidden": 4, "steps": 3, "warmup_steps": 20, "top": 2, "adversary_steps": 1, "attack_steps": 2,
    } | changes))  # fmt: skip


def small_lora(folder: Path) -> Path:
    """A LoRA of rank 2 on two maps of the embedded base."""
    torch.manual_seed(0)
    model = load_model(str(model_folder("base")), torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*layers\.(1|3)\.self_attn\.(q|o)_proj")
    adapted = peft.get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("tuned")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, decompose(settings(out, prompt="Who are you?"))


def test_a_run_says_what_there_is_to_explain_and_how_much_of_it_is(run: tuple[Path, dict[str, Any]]) -> None:
    values = {row["name"].removeprefix("decompose."): row["value"] for row in run[1]["rows"]}
    assert 0 < values["kl.explainable"] < values["kl.base"] and values["kl.rest"] > 0
    assert values["sufficiency.svd.384"] == pytest.approx(1, abs=1e-3)
    assert values["necessity.svd.384"] == pytest.approx(1, abs=1e-3)
    assert values["adversary.8"] >= values["adversary.0"] - 1e-6
    assert {"alive", "l0", "unexplained.rounded", "sufficiency.pieces.9", "robust.pieces.4"} <= values.keys()


def test_a_run_leaves_pieces_rows_and_a_graph_but_no_weight(run: tuple[Path, dict[str, Any]]) -> None:
    out, result = run
    assert {"run.json", "decomposition.json", "decomposition.safetensors", "pieces.parquet", "eval.json", "graph.html",
            "train.jsonl"} <= {path.name for path in out.iterdir()}  # fmt: skip
    assert json.loads((out / "eval.json").read_text())["rows"] == result["rows"]
    names = set(load_file(out / "decomposition.safetensors"))
    assert {name.split("/")[0] for name in names} == {"site", "network"} and len(names) == 3 * 6
    assert result["pieces"][0].keys() >= {"site", "piece", "context", "kl_needed", "raised", "cluster", "energy"}
    assert "https://" not in re.sub(r"<script.*?</script>", "", (out / "graph.html").read_text(), flags=re.S)


def test_a_finished_run_is_read_again_where_all_was_moved_and_found_in_itself(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result, out = run[1], shutil.copytree(run[0], tmp_path / "run")
    models = {name: str(shutil.copytree(model_folder(name), tmp_path / name)) for name in ("base", "tuned")}
    data = shutil.copy(document_file("dialogues_train"), tmp_path)
    written = (out / "decomposition.json").stat().st_mtime_ns
    again = decompose(settings(out, compare=[str(out)], data=str(data), **models))
    values = {row["name"]: row["value"] for row in again["rows"]}
    assert values["decompose.similarity.0"] == pytest.approx(1, abs=1e-4)
    before = {row["name"]: row["value"] for row in result["rows"]}
    assert {row["name"]: values[row["name"]] for row in result["rows"]} == pytest.approx(before, rel=1e-3, abs=1e-4)
    assert (out / "decomposition.json").stat().st_mtime_ns == written


def test_another_setting_in_the_same_folder_is_refused(run: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=re.escape("components = 3, now 4")):
        decompose(settings(run[0], components=4))


def test_other_documents_in_the_same_folder_are_refused(run: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"holds a run with data = .*dialogues_train"):
        decompose(settings(run[0], data=str(document_file("dialogues_heldout"))))


def test_a_lora_is_decomposed_between_its_factors(tmp_path: Path) -> None:
    folder = small_lora(tmp_path / "adapter")
    tuned = peft.PeftModel.from_pretrained(
        load_model(str(model_folder("base")), torch.float32), folder
    ).get_base_model()
    deltas = deltas_of(load_model(str(model_folder("base")), torch.float32), tuned, ["*"])
    assert len(deltas) == 4 and {tuple(delta.inner.shape) for delta in deltas.values()} == {(2, 2)}
    for name, delta in deltas.items():
        expected = tuned.get_submodule(name).get_delta_weight("default").detach()
        torch.testing.assert_close(delta.whole(), expected, rtol=0, atol=1e-5)
    out = tmp_path / "run"
    result = decompose(settings(out, tuned=str(folder), sites=["*"]))
    values = {row["name"].removeprefix("decompose."): row["value"] for row in result["rows"]}
    assert values["kl.rest"] == pytest.approx(0, abs=1e-5)
    assert values["sufficiency.lora.8"] == pytest.approx(1, abs=1e-3)
    assert load_file(out / "decomposition.safetensors")["site/model.layers.1.self_attn.q_proj/V"].shape == (128, 3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"sites": ["*nothing"]}, "sites: '*nothing' matches none of the"),
    ({"base": str(model_folder("tuned"))}, "are the same model"),
    ({"compare": ["nowhere"]}, "nowhere holds no decomposition"),
])  # fmt: skip
def test_what_cannot_be_decomposed_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        decompose(settings(tmp_path / "run", **changes))


def test_models_that_differ_outside_the_sites_alone_are_one_line(tmp_path: Path) -> None:
    shutil.copytree(model_folder("tuned"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="none of the 3 sites differs between the models"):
        decompose(settings(tmp_path / "run", base=str(tmp_path / "base")))


def test_maps_of_another_shape_are_one_line() -> None:
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(3, n)) for n in (4, 5))
    with pytest.raises(InputError, match=re.escape("site 0 is (4, 3) in the base and (5, 3) in the tuned model")):
        deltas_of(base, tuned, ["*"])


def test_the_head_and_the_embedding_are_no_sites() -> None:
    model = load_model(str(model_folder("base")), torch.float32)
    names = find_sites(model, ["*"])
    assert len(names) == 28 and not any("head" in name or "embed" in name for name in names)
    assert matrix(model.get_submodule(names[0])).shape == (128, 128)


def test_an_edge_is_what_the_output_loses_without_a_piece_to_first_order(run: tuple[Path, dict[str, Any]]) -> None:

    base, tuned = (load_model(str(model_folder(name)), torch.float32).eval() for name in ("base", "tuned"))
    config, _ = read_description(run[0])
    decomposition = fresh(tuned, deltas_of(base, tuned, SITES), config, is_relative=True)
    load_(decomposition, run[0])
    ids = torch.tensor([[2, 40, 41, 42]])
    graph = prompt_graph(decomposition, ids, AutoTokenizer.from_pretrained(model_folder("tuned")))
    edge = next(edge for edge in graph.edges if edge.target == -1)
    node = graph.nodes[edge.source]

    def odds(mask: float) -> float:
        components = torch.ones(1, 4, 3)
        components[0, node.position, node.piece] = mask
        with torch.no_grad(), decomposition.masked({node.site: Masks(components, torch.tensor(1.0))}):
            logits = tuned(input_ids=ids).logits[0, -1]
        best = logits.argmax() if mask == 1 else best_token
        return float(logits[best] - torch.cat([logits[:best], logits[best + 1 :]]).logsumexp(0))

    best_token = tuned(input_ids=ids).logits[0, -1].argmax()
    assert (odds(1.01) - odds(0.99)) / 0.02 == pytest.approx(edge.weight, rel=0.02, abs=1e-4)


def test_a_graph_is_drawn_with_a_line_for_each_edge() -> None:
    nodes = [Node("a", 0, 0, 1.0), Node("b", 1, 1, 0.5)]
    figure = draw(Graph(["x", "y"], "z", nodes, [Edge(0, 1, 2.0), Edge(1, -1, -1.0)]), ["a", "b"])
    assert len(figure.data) == 3 and figure.data[0].line.width > figure.data[1].line.width
    assert list(figure.data[1].y) == [1, 2]
