"""`diffing sae` on a tiny pair: numbers by independent routes, nulls and twins, one line for every wrong input."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer
from safetensors.torch import save_file
from shared_saes import POINT, SIZE, WIDTH, jumprelu, settings

from crosscoders import ActivationCache, InputError
from crosscoders.models.pair import ModelPair, inspect_pair, load_pair
from crosscoders.text.chats import read_chats
from crosscoders.text.tokens import ROLES
from diffing.causal.patching import measure
from diffing.causal.sets import PatchSet
from diffing.sae.clusters import DocumentSums
from diffing.sae.command import inspect, sae
from diffing.sae.dictionaries import directions
from diffing.sae.patching import SharedExchange, attribute
from diffing.sae.rates import compare_rates, reply_runs, whole_documents
from diffing.sae.twins import alignment
from sae_lora import load_dictionary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jumprelu(tmp_path_factory.mktemp("saes") / "sae")


@pytest.fixture(scope="module")
def dictionary(folder: Path) -> Any:
    return load_dictionary(folder)


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POINT, whole=True)


@pytest.fixture(scope="module")
def chats(pair: Pair, cache_folder: Path) -> list[Any]:
    tokenizer = inspect_pair(pair.base, pair.tuned, [POINT]).tokenizer
    return read_chats(ActivationCache(cache_folder).config.data_config(), tokenizer, 6)


def test_error_over_documents_is_the_jackknifes_to_first_order() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 40, 300)
    values = counts * generator.normal(1.0, 0.3, 300)
    sums = DocumentSums(1)
    for half in (slice(0, 120), slice(120, 300)):
        sums.add(torch.tensor(values[half])[:, None], torch.tensor(counts[half]).double())
    without = (values.sum() - values) / (counts.sum() - counts)
    jackknife = np.sqrt(299 / 300 * np.square(without - without.mean()).sum())
    assert float(sums.mean()) == pytest.approx(values.sum() / counts.sum())
    assert float(sums.stderr()) == pytest.approx(jackknife, rel=0.01)


def test_rates_are_those_of_each_models_own_activations(dictionary: Any, cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    tokens = cache.read(0, len(cache))
    f = [dictionary.encode(tokens.activations[:, m].float()).double() for m in range(2)]
    rates = compare_rates(dictionary, cache)
    table = rates.table
    np.testing.assert_allclose(table["rate_tuned"], (f[1] > 0).double().mean(dim=0))
    np.testing.assert_allclose(table["mean_change"], (f[1] - f[0]).mean(dim=0), atol=1e-6)
    norms = dictionary.sae.W_dec.norm(dim=1)
    np.testing.assert_allclose(table["change"], (f[1] - f[0]).mean(dim=0) * norms, atol=1e-5)
    assert rates.l0[0] == pytest.approx(float((f[0] > 0).sum(dim=1).double().mean()))


def test_batches_of_whole_documents_lose_and_cut_nothing(cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    parts = list(whole_documents(cache, 50))
    assert torch.equal(torch.cat([part.token_ids for part in parts]), cache.read(0, len(cache)).token_ids)
    seen = [set(part.document_ids.tolist()) for part in parts]
    assert len(parts) > 1 and not any(a & b for a, b in itertools.pairwise(seen))


def test_a_reply_is_a_run_of_response_tokens_of_one_document(cache_folder: Path) -> None:
    tokens = ActivationCache(cache_folder).read(0, 7)
    response, user = ROLES.index("assistant"), ROLES.index("user")
    roles = torch.tensor([response, response, user, response, response, response, user], dtype=torch.uint8)
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1], dtype=tokens.document_ids.dtype)
    assert reply_runs(tokens._replace(roles=roles, document_ids=documents)) == [(0, 2), (3, 4), (4, 6)]


def test_a_latent_is_exchanged_as_the_difference_of_its_activations(dictionary: Any) -> None:
    x = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(2)) * 2
    exchange = SharedExchange(dictionary, [5, 2])
    parts = exchange.take_apart(x, torch.zeros(9, dtype=torch.bool))
    f = [dictionary.encode(x[:, m]) for m in range(2)]
    wanted = x[:, 0] + (f[1] - f[0])[:, 2, None] * dictionary.sae.W_dec[2]
    torch.testing.assert_close(exchange.patched(parts, PatchSet("", "latents", (2,)), 1), wanted)
    every = SharedExchange(dictionary, list(range(SIZE)))
    all_latents = PatchSet("", "latents", tuple(range(SIZE)))
    parts = every.take_apart(x, torch.zeros(9, dtype=torch.bool))
    torch.testing.assert_close(
        every.patched(parts, all_latents, 1), every.patched(parts, PatchSet("", "all", ()), 1), atol=1e-4, rtol=1e-4
    )


def test_attribution_is_the_slope_of_the_kl_along_the_patch(dictionary: Any, whole: ModelPair, chats: Any) -> None:
    class Fraction(SharedExchange):
        def patched(self, parts: Any, patch: PatchSet, target: int) -> torch.Tensor:
            out, source = super().patched(parts, patch, target), parts.x[:, 1 - target]
            return source + {"plus": 0.02, "minus": -0.02}.get(patch.name, 0.0) * (out - source)

    attributed = attribute(dictionary, whole, chats)
    latent = int(attributed.values.abs().argmax())
    exchange = Fraction(dictionary, [latent])
    sets = {
        "base_to_tuned": [PatchSet("none", "none"), *(PatchSet(n, "latents", (latent,)) for n in ("plus", "minus"))]
    }
    sums = measure(exchange, whole, chats, sets)["base_to_tuned"]
    none, plus, minus, _ = sums.kl[0].sum(axis=1) / sums.n_tokens[0].sum()
    assert attributed.kl == pytest.approx(none, rel=1e-4)
    assert float(attributed.values[latent]) == pytest.approx((minus - plus) / 0.04, rel=0.02)


def test_directions_are_the_decoder_without_its_bias(dictionary: Any) -> None:
    torch.testing.assert_close(directions(dictionary), dictionary.sae.W_dec.data)


@pytest.fixture(scope="module")
def finished(pair: Pair, folder: Path, bar_labels: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with a copy of the SAE as its twin, and a null; do not write to it."""
    out = tmp_path_factory.mktemp("sae") / "out"
    twin = jumprelu(out.parent / "twin")
    null = out.parent / "null"
    make_tokenizer(null, template=False)
    make_model(null, seed=2)
    bar_labels.clear()
    sae(settings(pair, out, folder, tuned_sae=str(twin), null=str(null)))
    (out.parent / "bars.json").write_text(json.dumps(bar_labels))
    return out


def test_no_two_bars_of_a_run_have_the_same_words(finished: Path) -> None:
    labels = json.loads((finished.parent / "bars.json").read_text())
    assert len(set(labels)) == len(labels)
    assert {"sae", "sae, tuned SAE", "sae, null", "cache, null", "causal, splice of tuned_sae"} < set(labels)


def test_table_and_json_agree_and_hold_the_null_and_the_twin(finished: Path) -> None:
    table = pandas.read_parquet(finished / "sae.parquet")
    described = json.loads((finished / "sae.json").read_text())
    assert (described["format"], described["format_version"]) == ("diffing-sae", 1)
    assert {"null_change", "null_attribution", "twin_cosine", "rank_kl", "main_context"} <= set(table.columns)
    for order, rows in described["orders"].items():
        assert [int(table[f"rank_{order}"][row["latent"]]) for row in rows] == list(range(1, len(rows) + 1))
    names = {row["name"] for row in described["rows"]}
    assert {f"sae.{name}.{model}.splice_ce" for name in ("sae", "tuned_sae") for model in ("base", "tuned")} <= names
    value = {row["name"]: row["value"] for row in described["rows"]}
    assert value["sae.twins.aligned"] == 1.0 and value["sae.twins.aligned_permuted"] < 0.2
    threshold = value["sae.change.threshold"]
    assert value["sae.change.null_at_threshold"] == int((table["null_change"].abs() >= threshold).sum())


def test_a_second_run_uses_the_cached_activations_and_gives_the_same_table(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sae(settings(pair, out, folder, n_documents=0))
    before = (out / "cache" / "manifest.json").stat().st_mtime_ns
    first = (out / "sae.parquet").read_bytes()
    sae(settings(pair, out, folder, n_documents=0))
    assert (out / "cache" / "manifest.json").stat().st_mtime_ns == before
    assert (out / "sae.parquet").read_bytes() == first
    assert "attribution" not in pandas.read_parquet(out / "sae.parquet")


def test_shuffled_latents_do_not_align() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(400, 16, generator=generator)
    twin = W + 0.2 * torch.randn(400, 16, generator=generator)
    assert alignment(W, twin, 0).aligned > 0.95
    assert alignment(W, twin[torch.randperm(400, generator=generator)], 0).aligned < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 6}, "has d_model 6 but model .* has 16. Choose a dictionary of this model."),
        ({"hook_point": "blocks.9.hook_resid_post"}, "is not in .*: it has layers 0 to 2"),
    ],
)
def test_a_dictionary_of_another_width_or_hook_point_is_one_line(
    pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        inspect(settings(pair, tmp_path / "out", jumprelu(tmp_path / "sae", **changes)))


def test_twins_at_another_hook_point_and_strangers_are_refused(pair: Pair, folder: Path, tmp_path: Path) -> None:
    other = jumprelu(tmp_path / "other", hook_point="blocks.0.hook_resid_post")
    with pytest.raises(InputError, match=r"not at|belongs|has hook_point"):
        inspect(settings(pair, tmp_path / "out", folder, tuned_sae=str(other)))
    stranger = jumprelu(tmp_path / "stranger", roll=5)
    with pytest.raises(InputError, match="do not match by number"):
        sae(settings(pair, tmp_path / "out", folder, tuned_sae=str(stranger)))
    assert not (tmp_path / "out").exists()


def test_the_tuned_model_as_its_own_null_is_refused(pair: Pair, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the tuned model or the base itself"):
        inspect(settings(pair, tmp_path / "out", folder, null=pair.tuned))


def test_a_null_of_another_base_and_vocabularies_that_differ_are_one_line(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    wide, other = tmp_path / "wide", tmp_path / "other"
    for model, words in ((wide, None), (other, ["entirely other words make another vocabulary"])):
        make_tokenizer(model, words=words)
        make_model(model, seed=2, d_model=24 if model == wide else 16)
    with pytest.raises(InputError, match=r"is no tune of this base: .* has d_model 16 but"):
        inspect(settings(pair, tmp_path / "out", folder, null=str(wide)))
    with pytest.raises(InputError, match=r"tokenizer|vocabular"):
        inspect(settings(pair, tmp_path / "out", folder, tuned=str(other)))


def test_empty_data_is_one_line(pair: Pair, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"empty|no document"):
        inspect(settings(pair, tmp_path / "out", folder, data=str(empty)))


def test_a_transcoder_has_rates_and_no_patches(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "saes" / "layers.1.mlp"
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    weight, decoder = torch.randn(SIZE, WIDTH, generator=g), torch.randn(SIZE, WIDTH, generator=g)
    tensors = {"encoder.weight": weight, "encoder.bias": torch.zeros(SIZE), "W_dec": decoder,
               "b_dec": torch.zeros(WIDTH)}  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    config = {"k": 4, "d_in": WIDTH, "num_latents": SIZE, "activation": "topk", "skip_connection": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"transcode": True}))
    with pytest.raises(InputError, match=r"is a transcoder: .* Give --n-documents 0"):
        inspect(settings(pair, tmp_path / "out", folder))
    described = sae(settings(pair, tmp_path / "out", folder, n_documents=0))
    assert described["config"]["sae"] == str(folder) and "fve" not in str([row["name"] for row in described["rows"]])
    cache = ActivationCache(tmp_path / "out" / "cache")
    assert cache.manifest["hook_point"] == "blocks.1.mlp.hook_in"
    x = cache.read(0, len(cache)).activations.float()
    f = [(x[:, m] @ weight.T).clamp_min(0) for m in range(2)]
    f = [values * (values >= values.topk(4, dim=1).values[:, 3:]) for values in f]
    table = pandas.read_parquet(tmp_path / "out" / "sae.parquet")
    np.testing.assert_allclose(table["change"], (f[1] - f[0]).mean(dim=0) * decoder.norm(dim=1), atol=1e-4)
    values = {row["name"]: row["value"] for row in described["rows"]}
    assert values["sae.sae.base.l0"] == pytest.approx(4.0)
