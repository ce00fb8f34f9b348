"""Causal patching: every number by an independent route, the identity of all parts, planted causes found."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import Pair, make_tokenizer
from torch import Tensor

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, InputError
from crosscoders.models import hooks, predictions
from crosscoders.models.pair import ModelPair, inspect_pair, load_pair
from crosscoders.models.resume import ResumableModel
from crosscoders.text.chats import batches, read_chats, response_places
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.causal.patching import DIRECTIONS, Measured, cached_config, measure
from diffing.causal.sets import Exchange, PatchSet, choose_sets, orders, random_sets
from diffing.causal.summary import causal_rows, causal_summary
from diffing.latents.table import latent_table, scale_cache, write_table

POST = "blocks.1.hook_resid_post"
POINTS = (
    POST,
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_mlp_out",
)
IDS = torch.tensor([[2, 10, 20, 30, 44], [2, 40, 50, 0, 0]])
SETS = (
    "none all error bias template reconstruction cross_reconstruction chosen source_model best_half.norm "
    "worst_half.scaling top_2.scaling top_4.norm top_4.random"
).split()
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, whole=True)


@pytest.fixture(scope="module")
def crosscoder(cache_folder: Path) -> Crosscoder:
    """Random weights, another scale and mean for each model, decoders that differ; nothing here needs training."""
    cache, generator = ActivationCache(cache_folder), torch.Generator().manual_seed(0)
    made = Crosscoder(CrosscoderConfig(dict_size=24, k=4, d_model=cache.d_model)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=generator)
    made.W_dec += 0.3 * torch.randn(made.W_dec.shape, generator=generator)
    made.b_dec += 0.1 * torch.randn(made.b_dec.shape, generator=generator)
    made.input_scale.copy_(torch.tensor([1.5, 0.5]))
    made.input_mean.copy_(0.1 * torch.randn(made.input_mean.shape, generator=generator))
    made.threshold.fill_(0.2)
    return made


@pytest.fixture(scope="module")
def chats(pair: Pair, cache_folder: Path) -> list[Any]:
    return read_chats(cached_config(ActivationCache(cache_folder)), tokenizer_of(pair), 6)


def tokenizer_of(pair: Pair) -> Any:
    return inspect_pair(pair.base, pair.tuned, [POST]).tokenizer


# -------------------------------------------------------------------------------------------- metrics, models, hooks


def test_kl_and_ce_equal_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator) * 3 for _ in range(2))
    ids = torch.tensor([0, 6, 3, 3, 1])
    log_p, log_q = predictions.log_probs(p), predictions.log_probs(q)
    by_torch = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(predictions.kl(log_p, log_q), by_torch)
    torch.testing.assert_close(predictions.ce(log_q, ids), torch.nn.functional.cross_entropy(q, ids, reduction="none"))
    assert (predictions.kl(log_p, log_p) == 0).all() and (predictions.kl(log_p, log_q) > 0).all()
    assert predictions.log_probs(p.bfloat16()).dtype == torch.float32


def effect_of_hook(model: ResumableModel, state: Any, patched: torch.Tensor, hooked: Any, handle: Any) -> float:
    """Largest change of a logit by the hook, after checking that `model` patched in the same way agrees with it."""
    with torch.no_grad():
        expected = hooked(input_ids=IDS, attention_mask=MASK).logits
        handle.remove()
        unpatched = hooked(input_ids=IDS, attention_mask=MASK).logits
    real = MASK.bool()
    torch.testing.assert_close(model.logits(state.final[real]), unpatched[real], rtol=1e-4, atol=1e-5)
    found = model.logits(model.resume(state, patched)[real])
    torch.testing.assert_close(found, expected[real], rtol=1e-4, atol=1e-5)
    return float((expected - unpatched)[real].abs().max())


@pytest.mark.parametrize("point", POINTS)
def test_resumed_models_equal_a_full_forward_with_a_handwritten_hook(pair: Pair, point: str) -> None:
    from transformers import AutoModelForCausalLM

    model = ResumableModel(load_pair(pair.base, pair.tuned, point, whole=True).models[1], point)
    assert model.can_skip
    state = model.run(IDS, MASK)
    patched = state.activation + torch.randn(state.activation.shape, generator=torch.Generator().manual_seed(1))

    plain = AutoModelForCausalLM.from_pretrained(pair.tuned)
    layer = plain.model.layers[int(point.split(".")[1])]
    if point.endswith("pre"):
        handle = layer.register_forward_pre_hook(lambda _m, args: (patched, *args[1:]))
    elif point.endswith("mlp_out"):
        handle = layer.post_feedforward_layernorm.register_forward_hook(lambda *_: patched)
    else:
        handle = layer.register_forward_hook(lambda *_: patched)
    assert effect_of_hook(model, state, patched, plain, handle) > 1e-2
    assert torch.equal(model.resume(state, state.activation), state.final)


def test_a_model_whose_layers_cannot_be_left_out_gives_the_same_by_full_passes(whole: ModelPair) -> None:
    fast, slow = (ResumableModel(whole.models[1], POST) for _ in range(2))
    slow.can_skip = False
    state = fast.run(IDS, MASK)
    assert torch.equal(fast.resume(state, state.activation * 2), slow.resume(state, state.activation * 2))


def test_an_architecture_in_which_skipping_is_wrong_is_noticed(whole: ModelPair) -> None:
    model = whole.models[1]
    kept: list[Tensor] = []
    lower = model.model.layers[0].register_forward_hook(lambda _m, args, out: kept.append(out - args[0]))
    upper = model.model.layers[2].register_forward_hook(lambda _m, _a, out: out + kept[-1])  # reads a layer below
    try:
        assert not ResumableModel(model, POST).can_skip
    finally:
        lower.remove()
        upper.remove()
    assert ResumableModel(model, POST).can_skip


def test_layers_that_return_tuples_are_left_out_too(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    plain = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=60, n_positions=32, n_embd=16, n_layer=3, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=1
        )
    ).eval()
    model = ResumableModel(plain, POST)
    assert model.can_skip and model.as_tuple
    state = model.run(IDS, MASK)
    with torch.no_grad(), hooks.replace(plain, POST, lambda x: x * 2):
        expected = plain(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(model.logits(model.resume(state, state.activation * 2)[0]), expected[0])


def other_pair(folder: Path, config: Any) -> tuple[str, str]:
    """Folders of a base and a tuned model of an architecture without a fast path for its MLP."""
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder / name)
        make_tokenizer(folder / name)
    return str(folder / "base"), str(folder / "tuned")


def opt_config() -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=320, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=128, bos_token_id=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize("point", ["attn.hook_z", "hook_attn_out", "hook_mlp_out", "mlp.hook_pre"])
def test_points_of_the_bridge_resume_as_a_full_forward_with_a_handwritten_hook(tmp_path: Path, point: str) -> None:
    """OPT: its MLP has all tokens of a batch in one axis."""
    from transformers import AutoModelForCausalLM

    base, tuned = other_pair(tmp_path, opt_config())
    loaded = load_pair(base, tuned, f"blocks.1.{point}", whole=True)
    model = ResumableModel(loaded.models[1], f"blocks.1.{point}")
    assert model.can_skip
    state = model.run(IDS, MASK)
    patched = state.activation + torch.randn(state.activation.shape, generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(tuned).eval()
    layer = plain.model.decoder.layers[1]
    names = {"hook_mlp_out": "fc2", "mlp.hook_pre": "fc1"}
    module = layer.get_submodule(names.get(point, "self_attn.out_proj"))
    if point == "attn.hook_z":  # the input of the projection
        handle = module.register_forward_pre_hook(lambda _m, args: (patched.reshape(args[0].shape), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _a, out: patched.reshape(out.shape))
    assert effect_of_hook(model, state, patched, plain, handle) > 1e-3


def test_points_without_a_vector_for_each_token_are_one_line(pair: Pair) -> None:
    point = "blocks.1.attn.hook_pattern"
    model = load_pair(pair.base, pair.tuned, point, whole=True).models[0]
    with pytest.raises(InputError, match=r"of shape \(1, 2, 8, 8\) for tokens .* expected one vector for each token"):
        ResumableModel(model, point)
    with pytest.raises(InputError, match="did not fire"):
        ResumableModel(model, "blocks.1.hook_mlp_in")


def test_causal_runs_at_a_point_of_the_bridge_in_another_architecture(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import CacheConfig, cache_activations

    base, tuned = other_pair(tmp_path, opt_config())
    point = "blocks.1.hook_mlp_out"
    config: CacheConfig = pair.config(tmp_path / "cache", base=base, tuned=tuned, hook_point=point, n_tokens=400)
    cache = cache_activations(config)
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.W_dec += 0.3 * torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(1))
    made.save(tmp_path / "run", provenance=cache_inputs(cache))
    scales, contexts, _ = scale_cache(made, cache)
    table = latent_table(made, scales, contexts)
    table.to_parquet(tmp_path / "run" / "latents.parquet")
    write_table(tmp_path / "run", table, scales, cache)
    argv = ["causal", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--n-documents", "4"]
    argv += ["--n-latents", "2", "--random-draws", "2", "--json"]
    found = []
    for rows_at_once in ("1", "4"):
        assert cli.main([*argv, "--batch-rows", rows_at_once]) == 0
        found.append({row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]})
    assert found[0]["causal.base_to_tuned.none.kl"] > 1e-5
    for name, value in found[0].items():
        if name.endswith(".kl"):
            assert found[1][name] == pytest.approx(value, rel=2e-3, abs=1e-7), name


def test_bypassed_layers_are_back_after_an_error(whole: ModelPair) -> None:
    model = whole.models[0]
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(RuntimeError), hooks.bypass(model, 2):
            assert not torch.equal(model(IDS).logits, before)
            raise RuntimeError
        assert torch.equal(model(IDS).logits, before)
    assert not any("forward" in vars(layer) for layer in hooks.decoder_layers(model))


# --------------------------------------------------------------------------------------------------- patches and sets


def dense_patch(cc: Crosscoder, x: Tensor, latents: list[int], target: int) -> Tensor:
    """x_s + sum_j f_j (d_j^t / scale_t - d_j^s / scale_s), latent by latent."""
    f, source = cc.encode(x), 1 - target
    out = x[:, source].clone()
    for j in latents:
        out += f[:, j, None] * (
            cc.W_dec[j, target] / cc.input_scale[target] - cc.W_dec[j, source] / cc.input_scale[source]
        )
    return out


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("target", [0, 1])
def test_patches_are_in_the_units_of_x_with_each_models_own_scale(
    crosscoder: Crosscoder, target: int, folded: bool
) -> None:
    x = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(2)) * 2
    is_template = torch.arange(9) % 3 == 0
    exchange = Exchange(crosscoder.fold() if folded else crosscoder)
    parts = exchange.take_apart(x, is_template)
    source, x_hat = 1 - target, crosscoder(x)
    zero = crosscoder.decode(torch.zeros(1, 24))[0]

    def patched(kind: Any, latents: tuple[int, ...] = ()) -> Tensor:
        return exchange.patched(parts, PatchSet("", kind, latents), target)

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(patched("latents", (3, 7)), dense_patch(crosscoder, x, [3, 7], target), **close)
    every = dense_patch(crosscoder, x, list(range(24)), target)
    torch.testing.assert_close(patched("all"), every + zero[target] - zero[source], **close)
    torch.testing.assert_close(patched("bias"), x[:, source] + zero[target] - zero[source], **close)
    torch.testing.assert_close(patched("reconstruction"), x_hat[:, target], **close)
    torch.testing.assert_close(patched("cross_reconstruction"), x_hat[:, source], **close)
    torch.testing.assert_close(patched("template")[is_template], patched("all")[is_template])
    assert torch.equal(patched("template")[~is_template], x[:, source][~is_template])
    assert torch.equal(patched("none"), x[:, source])
    both = patched("all") + patched("error") - x[:, source]
    torch.testing.assert_close(both, x[:, target], **close)
    assert (crosscoder.encode(x) > 0).any(dim=0)[[3, 7]].all(), "the test needs latents that are active"


def table_of(**columns: list[float]) -> pandas.DataFrame:
    n = len(columns["n_active"])
    ratios = {f"nu_{kind}{side}": [0.0] * n for kind in ("error", "reconstruction") for side in ("", "_mirror")}
    return pandas.DataFrame({**ratios, "relative_decoder_norm": [0.5] * n, **columns})


def test_orders_are_those_of_a_worked_example_and_mirror_when_the_models_swap() -> None:
    table = table_of(
        n_active=[99, 99, 99, 99, 10],
        relative_decoder_norm=[0.6, 0.9, 0.4, 0.7, 1.0],
        # ranks by |.|: 0 -> 2, 1 -> 4, 2 -> 1, 3 -> 3
        nu_error=[-0.2, 0.9, 0.1, 0.3, 0.0],
        # ranks: 0 -> 2, 1 -> 1, 2 -> 3, 3 -> 4
        nu_reconstruction=[0.2, 0.1, 0.3, -0.9, 0.0],
    )
    found = orders(table, 1)
    assert found["scaling"].tolist() == [0, 1, 3, 2]  # sums 4, 5, 7; latent 2 (sum 4) leans to the base model
    assert found["norm"].tolist() == [1, 3, 0, 2]  # latent 4 is not alive
    swapped = table.rename(columns=lambda name: name.removesuffix("_mirror") if "mirror" in name else
                           f"{name}_mirror" if name.startswith("nu_") else name)  # fmt: skip
    swapped["relative_decoder_norm"] = 1 - swapped["relative_decoder_norm"]
    for score, order in orders(swapped, 0).items():
        assert order.tolist() == found[score].tolist()


def test_halves_are_those_of_the_latents_that_lean_to_the_target() -> None:
    norm = [0.9, 0.8, 0.7, 0.6, 0.3, 0.2]
    table = table_of(n_active=[99.0] * 6, relative_decoder_norm=norm, nu_error=[0.9, 0.1, 0.8, 0.2, 0.0, 0.0])
    sets = {s.name: set(s.latents) for s in choose_sets(table, 1, n_latents=[1], draws=1, seed=0)}
    assert sets["best_half.norm"] == {0, 1} and sets["worst_half.norm"] == {2, 3}
    assert sets["best_half.scaling"] == {1, 3} and sets["worst_half.scaling"] == {0, 2}


def test_random_sets_are_alive_distinct_seeded_and_as_frequent_as_asked() -> None:
    table = table_of(n_active=[float(n) for n in range(200)])
    drawn = random_sets(table, 20, draws=5, seed=0)
    assert drawn == random_sets(table, 20, draws=5, seed=0) != random_sets(table, 20, draws=5, seed=1)
    assert all(len(set(chosen)) == 20 and min(chosen) >= 30 for chosen in drawn)
    like = np.arange(190, 200)  # all from the most frequent tenth of the alive ones, 183 to 199
    for chosen in random_sets(table, 10, draws=5, seed=0, like=like):
        assert len(set(chosen)) == 10 and min(chosen) >= 183


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"latents": []}, "latents is an empty list"),
        ({"latents": [3, 24]}, "there is no latent 24: this crosscoder has latents 0 to 23"),
        ({"latents": [-1]}, "there is no latent -1"),
        ({"latents": [3, 3]}, "names one of them twice"),
        ({"n_latents": [0]}, "n_latents is 0; give a number from 1 to 24, the alive latents"),
        ({"n_latents": [4, 25]}, "n_latents is 25"),
    ],
)
def test_sets_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        choose_sets(table_of(n_active=[99.0] * 24), 1, **{"n_latents": [4], "draws": 2, "seed": 0, **settings})


# ---------------------------------------------------------------------------------------------------------- documents


def test_response_places_count_from_one_in_every_response() -> None:
    roles = np.array([1, 2, 1, 3, 3, 3, 1, 2, 1, 3, 3, 1])
    assert response_places(roles).tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 0]


def test_chats_are_those_of_the_data_and_batches_hold_each_once(pair: Pair, chats: list[Any]) -> None:
    tokenizer = tokenizer_of(pair)
    for chat in chats:
        response = tokenizer.decode(chat.ids[chat.roles == 3])
        assert response.startswith("Return the") and response.endswith("must not be empty.")
        assert not chat.scored[0] and chat.scored[1:].all()  # the beginning of sequence
    made = batches(chats, 4, 0)
    assert sorted(torch.cat([batch.documents for batch in made]).tolist()) == list(range(6))
    for batch in made:
        for row, number in enumerate(batch.documents.tolist()):
            n = len(chats[number].ids)
            assert batch.attention_mask[row].sum() == n and not batch.scored[row, n:].any()
            assert batch.ids[row, :n].tolist() == chats[number].ids.tolist()
            assert batch.place[row, :n].tolist() == response_places(chats[number].roles).tolist()


def test_data_without_responses_is_refused(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(cache_folder)
    (tmp_path / "raw.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(InputError, match=r"no document of .*raw.jsonl has a response"):
        read_chats(cached_config(cache, str(tmp_path / "raw.jsonl")), tokenizer_of(pair), 5)
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(InputError, match="has a response"):
        read_chats(cached_config(cache, str(tmp_path / "asked.jsonl")), tokenizer_of(pair), 5)
    make_tokenizer(tmp_path / "plain", template=False)
    plain = inspect_pair(pair.base, pair.tuned, [POST], tokenizer=str(tmp_path / "plain")).tokenizer
    with pytest.raises(InputError, match="no chat template"):
        read_chats(cached_config(cache), plain, 5)


# ---------------------------------------------------------------------------------------------------------- measuring


def slow_kl_and_ce(
    pair: ModelPair, cc: Crosscoder, chats: list[Any], patch: Any, target: int
) -> Iterator[tuple[int, int, float, float]]:
    """(document, place, KL, CE) chat by chat: full passes with a replaced activation, kl_div on whole logits."""
    models, log_softmax = pair.models, torch.nn.functional.log_softmax
    for number, chat in enumerate(chats):
        ids = torch.tensor(chat.ids)[None]
        seen = []
        for model in models:
            with hooks.capture(model, [POST]) as found, torch.no_grad():
                model(input_ids=ids)
            seen.append(found[POST][0])
        x = torch.stack(seen, dim=1)
        activation = x[:, target].clone()
        activation[1:] = patch(cc, x[1:], target)
        with torch.no_grad():
            p = log_softmax(models[target](input_ids=ids).logits[0], dim=-1)
            with hooks.replace(models[target], POST, lambda _, new=activation: new[None]):
                q = log_softmax(models[target](input_ids=ids).logits[0], dim=-1)
        for t, place in enumerate(response_places(chat.roles)):
            if place:
                kl = torch.nn.functional.kl_div(q[t - 1], p[t - 1], log_target=True, reduction="sum")
                yield number, int(place), float(kl), -float(q[t - 1, ids[0, t]])


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_measured_sums_equal_full_passes_chat_by_chat(
    whole: ModelPair, crosscoder: Crosscoder, chats: list[Any], direction: str
) -> None:
    target = DIRECTIONS[direction]
    sets = [
        PatchSet("none", "none"),
        PatchSet("chosen", "latents", (3, 7, 9)),
        PatchSet("reconstruction", "reconstruction"),
    ]
    routes = [
        lambda cc, x, t: x[:, 1 - t],
        lambda cc, x, t: dense_patch(cc, x, [3, 7, 9], t),
        lambda cc, x, t: cc(x)[:, t],
    ]
    found = measure(crosscoder, whole, chats, {direction: sets}, batch_rows=4, first_tokens=5)[direction]
    for i, route in enumerate(routes):
        kl, ce, n = np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 6))
        for document, place, kl_value, ce_value in slow_kl_and_ce(whole, crosscoder, chats, route, target):
            for window in range(2) if place <= 5 else (0,):
                kl[window, document] += kl_value
                ce[window, document] += ce_value
                n[window, document] += 1
        np.testing.assert_allclose(found.kl[:, i], kl, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.ce[:, i], ce, rtol=1e-4)
        assert (found.n_tokens == n).all()
    assert (found.n_tokens[1] == 5).all() and found.kl[0, 0].min() > 1e-3


def test_everything_together_gives_kl_0_and_the_other_model_is_the_unpatched_one(
    whole: ModelPair, crosscoder: Crosscoder, chats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(self: Exchange, parts: Any, patch: PatchSet, target: int) -> Tensor:
        kinds = ("all", "error")
        first, second = (original(self, parts, PatchSet("", kind), target) for kind in kinds)
        return first + second - parts.x[:, 1 - target]

    original = Exchange.patched
    none = measure(crosscoder, whole, chats, {"base_to_tuned": [PatchSet("none", "none")]})["base_to_tuned"]
    monkeypatch.setattr(Exchange, "patched", everything)
    found = measure(crosscoder, whole, chats, {d: [PatchSet("x", "all")] for d in DIRECTIONS})
    for direction in DIRECTIONS:
        assert abs(found[direction].kl[:, 0]).max() < 1e-4 * none.kl[0, 0].min()  # float32: 1e-7 a token
        np.testing.assert_allclose(found[direction].ce[:, 0], found[direction].own_ce, rtol=1e-5)
    np.testing.assert_allclose(found["base_to_tuned"].ce[:, -1], found["tuned_to_base"].own_ce, rtol=1e-6)


def test_batch_size_and_padding_do_not_matter(whole: ModelPair, crosscoder: Crosscoder, chats: list[Any]) -> None:
    sets = {"base_to_tuned": [PatchSet("none", "none"), PatchSet("all", "all")]}
    one, six = (measure(crosscoder, whole, chats, sets, batch_rows=n)["base_to_tuned"] for n in (1, 6))
    np.testing.assert_allclose(one.kl, six.kl, rtol=1e-3)


def test_the_latent_that_holds_the_only_difference_closes_the_kl_and_random_ones_do_not(
    pair: Pair, chats: list[Any], cache_folder: Path
) -> None:
    """The tuned model is the base model with one direction added after layer 1: only that latent is the cause."""
    loaded = load_pair(pair.base, pair.base, POST, whole=True)
    tuned = loaded.models[1]
    generator = torch.Generator().manual_seed(3)
    planted = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    ids = torch.tensor(chats[0].ids)[None]
    response = hooks.run_to(tuned, [POST], ids, torch.ones_like(ids))[POST][0, chats[0].roles == 3]
    probe = torch.nn.functional.normalize(response[3], dim=0)
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=0.3, generator=generator)
    made.W_dec[:, 1] += 0.01 * torch.randn(12, 16, generator=generator)  # a small difference, but not this one
    made.W_dec[5, 0], made.W_dec[5, 1] = 0, 20 * planted
    made.W_enc[:, :, 5] = 0
    made.W_enc[0, :, 5] = probe
    sets = [PatchSet("none", "none"), *(PatchSet(str(j), "latents", (j,)) for j in range(12))]
    add = tuned.model.layers[1].register_forward_hook(
        lambda _m, _a, x: x + 20 * (x @ probe).relu()[..., None] * planted
    )
    try:
        found = causal_rows({"base_to_tuned": measure(made, loaded, chats, {"base_to_tuned": sets})["base_to_tuned"]})
        table = latent_table(made, scale_cache(made, ActivationCache(cache_folder))[0])
    finally:
        add.remove()
    share = {row["name"].removeprefix("causal.base_to_tuned."): row for row in found}
    assert share["5.share_closed"]["value"] > 0.95 and share["5.share_closed"]["low"] > 0.9
    assert max(abs(share[f"{j}.share_closed"]["value"]) for j in range(12) if j != 5) < 0.1
    assert orders(table, 1)["norm"][0] == 5 and orders(table, 0)["norm"][-1] == 5


# --------------------------------------------------------------------------------------------------- rows and words


def made_up(n_documents: int = 40) -> Measured:
    """Documents of 10 tokens; KL 2 with none, 1 with top_4.scaling, 1.8 or 2 with the two random draws."""
    generator = np.random.default_rng(0)
    level = generator.uniform(0.5, 1.5, n_documents) * 10
    names = ["none", "top_4.scaling", "top_4.norm", "top_4.random", "top_4.random", "source_model"]
    kl = np.stack([factor * level for factor in (2, 1, 1.5, 1.8, 2.0, 3.0)])
    tokens = np.full((2, n_documents), 10)
    return Measured(names, np.stack([kl, kl]), np.stack([kl, kl]), np.stack([level, level]), tokens)


def test_rows_are_ratios_of_sums_with_paired_intervals() -> None:
    measured = made_up()
    found = {row["name"]: row for row in causal_rows({"base_to_tuned": measured}, first_tokens=5)}
    start = "causal.base_to_tuned"
    assert found[f"{start}.documents"]["value"] == 40
    none, top = found[f"{start}.none.kl"], found[f"{start}.top_4.scaling.share_closed"]
    assert none["value"] == pytest.approx(measured.kl[0, 0].sum() / 400) and none["n"] == 400
    # A share is exact in every resample here, since both sums move together: the pairing shows.
    assert [top[key] for key in ("value", "low", "high")] == pytest.approx([0.5, 0.5, 0.5])
    assert found[f"{start}.none.kl"]["low"] < none["value"] < found[f"{start}.none.kl"]["high"]
    random = found[f"{start}.top_4.random.share_closed"]
    assert [random[key] for key in ("value", "low", "high")] == pytest.approx([0.05, 0.0, 0.1])  # over draws too
    assert found[f"{start}.top_4.random_largest.share_closed"]["value"] == pytest.approx(0.1)
    assert found[f"{start}.top_4.scaling_minus_norm.share_closed"]["value"] == pytest.approx(0.25)
    assert found[f"{start}.top_4.scaling_minus_random.first_5.share_closed"]["value"] == pytest.approx(0.45)
    assert f"{start}.none.share_closed" not in found
    text = causal_summary(list(found.values()), 5)
    assert "400 response tokens of 40 chats" in text and "50.0%" in text and "tuned to base" not in text


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    generator, inside = np.random.default_rng(1), 0
    for trial in range(60):
        measured = made_up(30)
        measured.kl[:, 0] = generator.exponential(20.0, 30)  # true mean 2 per token
        row = next(r for r in causal_rows({"base_to_tuned": measured}, seed=trial) if r["name"].endswith("none.kl"))
        inside += row["low"] <= 2.0 <= row["high"]
    assert inside >= 48  # 95% nominal; a percentile bootstrap of 30 skewed values covers about 91%


def test_one_document_has_no_interval_and_equal_models_nothing_to_close() -> None:
    one = made_up(1)
    assert all(row["low"] is None for row in causal_rows({"base_to_tuned": one}))
    one.kl[:] = 0
    with pytest.raises(InputError, match="no KL to close"):
        causal_rows({"base_to_tuned": one})


# -------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(crosscoder: Crosscoder, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a latent table; do not write to it."""
    folder, cache = tmp_path_factory.mktemp("causal") / "run", ActivationCache(cache_folder)
    crosscoder.save(folder, provenance=cache_inputs(cache))
    scales, contexts, _ = scale_cache(crosscoder, cache)
    table = latent_table(crosscoder, scales, contexts)
    table.to_parquet(folder / "latents.parquet")
    write_table(folder, table, scales, cache)
    return folder


def test_the_command_writes_rows_that_stay_and_a_table(
    run: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["causal", str(run), "--cache", str(cache_folder), "--n-documents", "6", "--n-latents", "[2,4]"]
    argv += ["--random-draws", "3", "--latents", "[1,2]", "--match-frequency", "true"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((run / "causal.json").read_text()) == found
    names = {row["name"] for row in found["rows"]}
    for direction in DIRECTIONS:
        for name in SETS:
            assert {f"causal.{direction}.{name}{window}.kl" for window in ("", ".first_9")} <= names
        assert f"causal.{direction}.top_4.scaling.share_closed" in names and f"causal.{direction}.unpatched.ce" in names
    assert cli.main(argv) == 0
    assert "tuned to base: " in capsys.readouterr().out


def test_wrong_runs_caches_and_lists_are_one_line(
    run: Path, pair: Pair, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import cache_activations

    other = tmp_path / "other"
    cache_activations(pair.config(other, hook_point="blocks.0.hook_resid_post", n_tokens=200))
    bare, wide, torn = tmp_path / "bare", tmp_path / "wide", tmp_path / "torn"
    for folder, d_model in ((bare, 16), (wide, 8), (torn, 16)):
        Crosscoder(CrosscoderConfig(dict_size=24, k=4, d_model=d_model)).save(folder)
        if folder != bare:
            for name in ("latents.json", "latents.parquet"):
                (folder / name).write_bytes((run / name).read_bytes())
    (torn / "latents.parquet").write_bytes(b"torn")
    cached = ["--cache", str(cache_folder)]
    for argv, status, line in [
        ([str(tmp_path / "no"), *cached], 2, "is not a folder"),
        ([str(bare), *cached], 2, "has no latent table (latents.json). Make it first: diffing scale"),
        ([str(torn), *cached], 4, "latents.parquet cannot be read"),
        ([str(wide), *cached], 2, "has d_model = 16 but the crosscoder reads 8"),
        ([str(run), "--cache", str(other)], 2, "has another hook_point ('blocks.0.hook_resid_post')"),
        (
            [str(run), *cached, "--n-latents", "2", "--latents", "[99]"],
            2,
            "there is no latent 99: this crosscoder has latents 0 to 23",
        ),
        ([str(run), *cached, "--n-latents", "2", "--latents", "[]"], 2, "latents is an empty list"),
        ([str(run), *cached, "--n-latents", "9999"], 2, "n_latents is 9999; give a number from 1 to"),
        ([str(run), *cached, "--n-documents", "0"], 2, "n_documents is 0"),
        ([str(run), *cached, "--n-latents", "2", "--data", str(tmp_path / "no.jsonl")], 2, "no.jsonl' does not exist"),
    ]:
        assert cli.main(["causal", *argv]) == status
        text = capsys.readouterr().err
        assert line in text.splitlines()[-1] and "Traceback" not in text


def test_a_crosscoder_of_one_model_is_refused() -> None:
    with pytest.raises(InputError, match="patching needs a crosscoder of two models; this one has 1"):
        Exchange(Crosscoder(CrosscoderConfig(dict_size=4, k=1, d_model=4, n_models=1)))


def test_a_crosscoder_of_another_width_is_refused(whole: ModelPair, chats: list[Any]) -> None:
    narrow = Crosscoder(CrosscoderConfig(dict_size=4, k=1, d_model=8))
    with pytest.raises(InputError, match="activations of width 16 at this hook point but the crosscoder reads 8"):
        measure(narrow, whole, chats, {"base_to_tuned": [PatchSet("none", "none")]})
    with pytest.raises(InputError, match="measure needs chats and sets for base_to_tuned or tuned_to_base"):
        measure(narrow, whole, chats, {"sideways": []})


def test_an_adapter_is_measured_like_its_merged_model(
    pair: Pair, crosscoder: Crosscoder, chats: list[Any], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(pair.base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer(tmp_path / "merged")
    sets = {"base_to_tuned": [PatchSet("none", "none"), PatchSet("all", "all")]}
    by_adapter, by_merge = (
        measure(crosscoder, load_pair(pair.base, str(tmp_path / name), POST, whole=True), chats, sets)[
            "base_to_tuned"
        ].kl
        for name in ("adapter", "merged")
    )
    np.testing.assert_allclose(by_adapter, by_merge, rtol=1e-3)
