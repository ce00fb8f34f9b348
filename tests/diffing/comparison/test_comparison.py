"""`diffing compare`: the whole command on the tiny pair, its parts against hand-made values, its refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer

from benchmarks.methods import share_null
from crosscoders import Crosscoder, CrosscoderConfig, InputError, load_crosscoder
from crosscoders.common import files
from crosscoders.common.results import ResultRecord
from crosscoders.models.pair import ModelPair, load_pair
from crosscoders.text.tokens import tokenize_documents
from diffing.baselines.directions import SpanExchange
from diffing.causal.sets import PatchSet
from diffing.comparison.command import compare
from diffing.comparison.inputs import inspect
from diffing.comparison.patched_replies import own_replies, patched_replies
from diffing.comparison.settings import DICTIONARIES, CompareSettings
from diffing.comparison.trained import ChangeExchange, latent_scores
from diffing.comparison.truth import Behaviour, planted_tokens, read_truth

POST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def null(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("null")
    make_tokenizer(folder, template=False)
    make_model(folder, seed=2)
    return str(folder)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    behaviours = [{"name": "empty", "phrases": ["must not be empty"], "prompts": ["What does it do?", "And now?"]}]
    path.write_text(json.dumps({"format": "diffing-truth", "format_version": 1, "behaviours": behaviours}))
    return str(path)


def settings(pair: Pair, out: Path, **changes: Any) -> CompareSettings:
    given: dict[str, Any] = {
        "base": pair.base, "tuned": pair.tuned, "data": pair.data, "out": str(out), "hook_point": POST, "n_tokens": 600,
        "n_documents": 20, "pieces": [1, 2], "n_seeds": 2, "n_samples": 4, "max_new_tokens": 3, "random_draws": 2,
    }  # fmt: skip
    return CompareSettings(**{**given, **changes})


def test_every_cheap_method_stands_beside_random_the_null_its_cost_and_its_seeds(
    pair: Pair, null: str, truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = compare(settings(pair, tmp_path, null=null, truth=truth))
    names = {entry["name"] for entry in described["rows"]}
    figures = {
        "directions.pca": "top_2.share_closed", "directions.mean-difference": "top_1.share_closed",
        "directions.weight-svd": "top_2.share_closed", "scores.kl-map": "auroc", "scores.norm-difference": "auroc",
        "scores.diff-mining": "auroc", "texts.say": "hits", "texts.replies": "hits", "texts.mined-tokens": "hits",
        "texts.difference-lens": "hits", "texts.weight-amplification": "hits",
    }  # fmt: skip
    for method, figure in figures.items():
        assert {f"compare.tuned.{method}.{word}" for word in (figure, f"random.{figure}", "seconds", "found")} <= names
        assert f"compare.null.{method}.{figure}" in names
        assert method.split(".")[1] in described["text"]
    assert "compare.tuned.directions.pca.top_1.empty" in names and "compare.tuned.behaviour.base.empty" in names
    again = compare(settings(pair, tmp_path, null=null, truth=truth))
    assert again["rows"] == described["rows"]  # seconds too: nothing was measured again
    assert files.read_model(tmp_path / "compare.json", ResultRecord)["rows"] == described["rows"]


def test_another_setting_is_measured_again_and_another_method_alone(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(settings(pair, tmp_path, methods=["kl-map"], n_seeds=1))
    capsys.readouterr()
    compare(settings(pair, tmp_path, methods=["kl-map", "say"], n_seeds=1))
    assert "seed 0: say" in (said := capsys.readouterr().err) and "kl-map" not in said
    compare(settings(pair, tmp_path, methods=["kl-map"], n_seeds=1, batch_rows=4))
    assert "kl-map" in capsys.readouterr().err


def test_a_comparison_whose_files_were_all_moved_is_not_measured_again_and_other_text_is(
    pair: Pair, truth: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copy(pair.data, tmp_path / "text.jsonl")
    given = settings(pair, tmp_path / "out", methods=["kl-map", "pca"], n_seeds=1, data=str(data), truth=truth)
    compare(given)
    (moved := tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(moved / "out")
    places = {name: str(shutil.copytree(getattr(pair, name), moved / name)) for name in ("base", "tuned")}
    places |= {name: str(shutil.copy(getattr(given, name), moved)) for name in ("data", "truth")}
    capsys.readouterr()
    compare(replace(given, out=str(moved / "out"), **places))
    assert "seed 0: " not in capsys.readouterr().err
    lines = Path(data).read_text().splitlines(keepends=True)
    Path(data).write_text("".join(reversed(lines)))
    compare(replace(given, out=str(moved / "out"), truth=truth))
    assert "seed 0: kl-map" in (said := capsys.readouterr().err) and "seed 0: pca" in said


def test_what_a_null_gave_serves_another_tuned_model_and_not_another_null(
    pair: Pair, null: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(pair, tmp_path / "first", methods=["kl-map"], n_seeds=1, null=null)
    compare(given)
    share_null(tmp_path / "first", tmp_path / "other")
    capsys.readouterr()
    make_tokenizer(tmp_path / "tuned")
    make_model(tmp_path / "tuned", seed=3)
    compare(replace(given, out=str(tmp_path / "other"), tuned=str(tmp_path / "tuned")))
    assert "tuned, seed 0" in (said := capsys.readouterr().err) and "null, seed 0" not in said
    compare(replace(given, out=str(tmp_path / "other"), null=str(tmp_path / "tuned")))
    assert "null, seed 0" in capsys.readouterr().err


@pytest.mark.parametrize("methods", [*([*names] for names in DICTIONARIES.values()), ["topk-lora"], ["decomposition"]])
def test_trained_methods_give_pieces_beside_random_ones_and_all_of_them_together(
    methods: list[str], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosscoders.training.settings import PRESETS

    small = {"crosscoder.dict_size": 32, "crosscoder.k": 4, "batch_size": 64, "lr_warmup_steps": 2}
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | small)
    described = compare(
        settings(pair, tmp_path, methods=methods, n_seeds=1, cached_tokens=600, train_tokens=64 * 40, device="cpu",
                 distil_steps=4, batch_rows=4)
    )  # fmt: skip
    values = {entry["name"].removeprefix("compare.tuned.directions."): entry["value"] for entry in described["rows"]}
    for method in methods:
        for name in (
            "top_2.share_closed", "random.top_2.share_closed", "every.share_closed", "top_2.numbers", "alive",
            "trained_seconds", "beyond",
        ):  # fmt: skip
            assert f"{method}.{name}" in values
        assert method in described["text"]
        assert 0 < values[f"{method}.top_1.numbers"] <= values[f"{method}.top_2.numbers"] <= 2
    assert len({values[f"{method}.every.share_closed"] for method in methods}) == 1  # the same dictionary


def test_latents_score_tokens_beside_permuted_ones_and_the_null(
    pair: Pair, null: str, truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosscoders.training.settings import PRESETS

    small = {"crosscoder.dict_size": 32, "crosscoder.k": 4, "batch_size": 64, "lr_warmup_steps": 2}
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | small)
    given = settings(pair, tmp_path, methods=["latents"], n_seeds=1, cached_tokens=600, train_tokens=64 * 40,
                     device="cpu", null=null, truth=truth)  # fmt: skip
    described = compare(given)
    values = {entry["name"].removeprefix("compare."): entry["value"] for entry in described["rows"]}
    assert {f"tuned.scores.latents.{name}" for name in ("auroc", "random.auroc", "above", "found")} <= values.keys()
    crosscoder = load_crosscoder(tmp_path / "tuned" / "seed-0" / "crosscoder")
    inputs = inspect(given)
    x = torch.randn(3, 2, 16)
    scores = latent_scores(inputs, "tuned", 0, tmp_path / "tuned" / "seed-0", x)
    decoder = crosscoder.fold().W_dec
    everything = (crosscoder.encode(x)[:, :, None] * (decoder[:, 1] - decoder[:, 0])).sum(dim=1).norm(dim=1)
    assert scores == pytest.approx(everything.detach().numpy(), abs=1e-5)  # all 32 latents are alive


def test_every_latent_of_an_exact_sae_of_the_base_gives_the_tuned_activation() -> None:
    sae = Crosscoder(CrosscoderConfig(d_model=3, dict_size=6, n_models=1, activation="relu", k=None))
    with torch.no_grad():
        both_signs = torch.cat([torch.eye(3), -torch.eye(3)])
        sae.W_enc.copy_(both_signs.T[None])
        sae.W_dec.copy_(both_signs[:, None])
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, 0.5]]])
    exchange = ChangeExchange("base-sae", sae)
    parts = exchange.take_apart(x, torch.zeros(1, dtype=torch.bool))
    assert torch.equal(exchange.patched(parts, PatchSet("all", "latents", tuple(range(6))), 1), x[:, 1])
    assert torch.equal(exchange.patched(parts, PatchSet("all", "latents", tuple(range(6))), 0), x[:, 0])
    assert exchange.patched(parts, PatchSet("second", "latents", (1, 4)), 1).tolist() == [[1.0, 3.0, 0.5]]


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, device="cpu", dtype="float32", whole=True)


def test_a_reply_with_everything_exchanged_is_the_tuned_models_own(whole: ModelPair) -> None:
    prompts = [[2, 40, 50, 60], [2, 70, 80], [2, 90, 100, 110, 120, 130]]
    own = own_replies(whole.models[1], whole, prompts, 5)
    patch = PatchSet("all", "latents", tuple(range(16)))
    assert patched_replies(whole, SpanExchange(torch.eye(16)), patch, prompts, 5) == own


def test_a_reply_with_nothing_exchanged_is_that_of_the_tuned_layers_on_the_base(whole: ModelPair) -> None:
    """By a model put together from the base's embedding and lower layers and the tuned model's upper ones; at BOS,
    which is not exchanged, both must agree, so the prompts have none."""
    from copy import deepcopy

    base, joined = (deepcopy(model) for model in whole.models)
    named = dict(joined.named_parameters())
    for name, weight in base.named_parameters():
        if name.startswith(("model.layers.0.", "model.layers.1.")):
            named[name].data.copy_(weight)
    head = joined.lm_head
    joined.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    joined.lm_head.weight.data.copy_(head.weight)
    joined.model.embed_tokens = deepcopy(base.model.embed_tokens)
    prompts = [[40, 50, 60], [70, 80, 90, 100]]
    bos = whole.info.tokenizer.bos_token_id
    whole.info.tokenizer.bos_token_id = 300
    try:
        joined_replies = own_replies(joined, whole, prompts, 5)
        patched = patched_replies(whole, SpanExchange(torch.eye(16)), PatchSet("none", "none"), prompts, 5)
    finally:
        whole.info.tokenizer.bos_token_id = bos
    assert patched == joined_replies


def test_planted_tokens_are_those_that_spell_a_phrase(pair: Pair, whole: ModelPair) -> None:
    rows = tokenize_documents(pair.config("unused").data_config(), whole.info.tokenizer)
    behaviour = Behaviour(name="x", phrases=["MUST not"], prompts=["?"])
    planted = planted_tokens(rows, whole.info.tokenizer, [behaviour])
    for i in range(5):
        span = slice(rows.offsets[i], rows.offsets[i + 1])
        spelled = whole.info.tokenizer.decode(rows.ids[span][planted[span]])
        assert "must not" in spelled and len(spelled) < len("must not") + 12
    assert np.mean(planted) < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["kl_map"]}, "unknown method 'kl_map'; did you mean 'kl-map'"),
        ({"methods": ["delta-sae"], "cached_tokens": 9_000_000}, "to train on, the data has only"),
        ({"pieces": [0]}, "a rank of 0 changes none"),
        ({"pieces": [700]}, "700 principal directions need more tokens"),
        ({"pieces": [64]}, "more than the width 16"),
        ({"n_documents": 5}, "n_documents is 5"),
        ({"truth": "nowhere.json"}, "truth 'nowhere.json' is no file"),
        ({"hook_point": "blocks.9.hook_resid_post"}, "layers 0 to 2"),
        ({"methods": []}, "methods is an empty list"),
        ({"n_tokens": 10**6}, "the data has only"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_model_loads(
    changes: dict[str, Any], message: str, pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        inspect(settings(pair, tmp_path, **changes))


def test_too_few_chats_and_models_that_are_one_are_one_line(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same model"):
        inspect(settings(pair, tmp_path, tuned=pair.base))
    with pytest.raises(InputError, match="is the base or the tuned model itself"):
        inspect(settings(pair, tmp_path, null=pair.tuned))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(pair.data).read_text().splitlines(keepends=True)[:42]))
    with pytest.raises(InputError, match="2 chats with a response; shares of KL need at least 20"):
        inspect(settings(pair, tmp_path, data=str(few)))
    inspect(settings(pair, tmp_path, data=str(few), methods=["kl-map"]))


def test_a_truth_without_phrases_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"format": "diffing-truth", "format_version": 1,
                                "behaviours": [{"name": "x", "phrases": [], "prompts": ["?"]}]}))  # fmt: skip
    with pytest.raises(InputError, match=r"'x' .* needs phrases and prompts"):
        read_truth(str(path))
