"""Causal patching: every number by an independent route, the identity of all parts, planted causes found."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_pairs import POST, cached_chats, dense_patch, tokenizer_of, uneven_crosscoder
from conftest import Pair, make_tokenizer
from torch import Tensor

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, InputError
from crosscoders.models import hooks
from crosscoders.models.pair import ModelPair, inspect_pair, load_pair
from crosscoders.text.chats import batches, read_chats, response_places
from diffing.causal.patching import DIRECTIONS, measure
from diffing.causal.sets import Exchange, PatchSet, orders
from diffing.causal.summary import causal_rows
from diffing.latents.decoder_norms import decoder_difference
from diffing.latents.table import latent_table, scale_cache


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, whole=True)


@pytest.fixture(scope="module")
def crosscoder(cache_folder: Path) -> Crosscoder:
    return uneven_crosscoder(cache_folder)


@pytest.fixture(scope="module")
def chats(pair: Pair, cache_folder: Path) -> list[Any]:
    return cached_chats(pair, cache_folder)


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
    assert sorted(np.concatenate([batch.tokens.numbers for batch in made]).tolist()) == list(range(6))
    for batch in made:
        for row, number in enumerate(batch.tokens.numbers.tolist()):
            n = len(chats[number].ids)
            assert batch.tokens.attention_mask[row].sum() == n and not batch.tokens.scored[row, n:].any()
            assert batch.tokens.ids[row, :n].tolist() == chats[number].ids.tolist()
            assert batch.place[row, :n].tolist() == response_places(chats[number].roles).tolist()


def test_data_without_responses_is_refused(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(cache_folder)
    (tmp_path / "raw.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(InputError, match=r"no document of .*raw.jsonl has a response"):
        read_chats(replace(cache.config.data_config(), data=str(tmp_path / "raw.jsonl")), tokenizer_of(pair), 5)
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(InputError, match="has a response"):
        read_chats(replace(cache.config.data_config(), data=str(tmp_path / "asked.jsonl")), tokenizer_of(pair), 5)
    make_tokenizer(tmp_path / "plain", template=False)
    plain = inspect_pair(pair.base, pair.tuned, [POST], tokenizer=str(tmp_path / "plain")).tokenizer
    with pytest.raises(InputError, match="tokenizer has a chat template"):
        read_chats(cache.config.data_config(), plain, 5)


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
    tuned_first, base_first = (orders(table, target, decoder_difference(made).numpy()) for target in (1, 0))
    assert tuned_first["norm"][0] == 5 and base_first["norm"][-1] == 5
    assert tuned_first["difference"][0] == base_first["difference"][0] == 5


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
