"""Steering and the logit lens: the same with and without a cache of keys and values, units of x, direct readings."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair
from generation import stepwise_and_whole
from torch import Tensor

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, InputError, cache_activations
from crosscoders.models import hooks
from crosscoders.models.pair import ModelPair, load_pair
from crosscoders.text.decoding import token_text
from crosscoders.text.tokens import tokenize_prompt
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.causal.lens import logit_lens
from diffing.causal.steering import answer, steered, steering_vector
from diffing.latents.table import read_table, scale_run

POST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, whole=True)


@pytest.fixture(scope="module")
def crosscoder() -> Crosscoder:
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.W_dec += torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(1))
    made.input_scale.copy_(torch.tensor([2.0, 0.25]))
    return made


@pytest.fixture(scope="module")
def run(crosscoder: Crosscoder, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its table; do not write to it."""
    folder, cache = tmp_path_factory.mktemp("steer") / "run", ActivationCache(cache_folder)
    crosscoder.save(folder, provenance=cache_inputs(cache))
    scale_run(folder, cache)
    return folder


def test_the_vector_is_in_the_units_of_x(crosscoder: Crosscoder) -> None:
    for side, scale in enumerate((2.0, 0.25)):
        expected = 3 * crosscoder.W_dec[5, side] / scale
        for cc in (crosscoder, crosscoder.fold()):
            torch.testing.assert_close(steering_vector(cc, 5, side=side, activation=3.0), expected)


def steered_logits(model: Any, ids: Tensor, point: str, *, use_cache: bool) -> Tensor:
    """Of a steered greedy answer, after checking that both routes to them agree and that steering moves them."""
    vector, mask = torch.randn(16, generator=torch.Generator().manual_seed(2)) * 5, torch.ones_like(ids)
    plain, _ = stepwise_and_whole(model, ids, mask, 1)
    with steered(model, point, vector):
        stepwise, whole = stepwise_and_whole(model, ids, mask, 12, use_cache=use_cache)
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-5)  # sums in another order
    assert float((stepwise[:, 0] - plain[:, 0]).abs().max()) > 0.1
    return whole


@pytest.mark.parametrize("use_cache", [True, False])
def test_steered_answers_are_the_same_with_and_without_a_cache(whole: ModelPair, use_cache: bool) -> None:
    steered_logits(whole.models[1], torch.tensor([[2, 10, 20, 30]]), POST, use_cache=use_cache)


@pytest.mark.parametrize("point", [POST, "blocks.1.hook_mlp_out"])
def test_an_answer_is_the_greedy_text_that_no_cache_gives_and_strength_0_changes_nothing(
    pair: Pair, point: str
) -> None:
    """The second point needs a bridge."""
    loaded = load_pair(pair.base, pair.tuned, point, whole=True)
    model, tokenizer = loaded.models[1], loaded.info.tokenizer
    chat = [{"role": "user", "content": "Return the sum."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, hooks.core_model(model)(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    with steered(model, point, torch.zeros(16)):
        assert answer(model, tokenizer, "Return the sum.", max_new_tokens=12) == expected != ""


def test_each_position_is_steered_exactly_once(whole: ModelPair) -> None:
    model, vector = whole.models[1], torch.arange(16.0)
    ids = torch.tensor([[2, 10, 20]])
    layer, seen = model.model.layers[1], []
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states[2]
        with steered(model, POST, vector):
            handle = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(ids)
            handle.remove()
    torch.testing.assert_close(seen[0], plain + vector)


def test_the_lens_is_the_final_norm_and_unembedding_of_each_model(whole: ModelPair, crosscoder: Crosscoder) -> None:
    found = logit_lens(crosscoder, whole, [3, 7], n_tokens=4)
    for latent in (3, 7):
        for m, name in enumerate(("base", "tuned")):
            model = whole.models[m]
            direction = crosscoder.W_dec[latent, m] / crosscoder.input_scale[m]
            logits = model.lm_head(model.model.norm(direction)).detach()[: len(whole.info.tokenizer)]
            expected = [token_text(whole.info.tokenizer, int(t)) for t in logits.argsort(descending=True)[:4]]
            assert found[str(latent)][name] == expected


def test_the_commands_answer_and_read(run: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = ["--cache", str(cache_folder)]
    argv = ["steer", str(run), *cached, "--latent", "3", "--prompt", "Hi", "--max-new-tokens", "4"]
    assert cli.main([*argv, "--strengths", "[0,2]", "--model", "tuned", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [entry["strength"] for entry in answers] == [0, 2]
    assert cli.main(["lens", str(run), *cached, "--latents", "[4]", "--top", "3"]) == 0
    heads = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert heads[:3] == [["latent", "of"], ["4", "base"], ["4", "tuned"]] and heads[3] == ["latent:", "its"]
    assert len(json.loads((run / "lens.json").read_text())["latents"]["4"]["tuned"]) == 3
    assert cli.main(["lens", str(run), *cached]) == 0
    assert len(json.loads((run / "lens.json").read_text())["latents"]) == len(read_table(run))


def test_steer_asks_in_the_template_and_on_the_date_of_the_cache(
    pair: Pair, crosscoder: Crosscoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ bos_token }}{{ strftime_now('%Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    settings = {"chat_template": str(tmp_path / "t.jinja"), "template_date": "1999-01-01", "n_tokens": 100}
    cache = cache_activations(pair.config(tmp_path / "cache", **settings))
    crosscoder.save(tmp_path / "run", provenance=cache_inputs(cache))
    scale_run(tmp_path / "run", cache)
    asked = []
    monkeypatch.setattr(
        "diffing.causal.steering.tokenize_prompt",
        lambda tokenizer, *words, **more: asked.append(tokenize_prompt(tokenizer, *words, **more)) or asked[-1],
    )
    argv = ["steer", str(tmp_path / "run"), "--cache", str(cache.path), "--latent", "1", "--prompt", "Hello"]
    assert cli.main([*argv, "--max-new-tokens", "2"]) == 0
    tokenizer = load_pair(pair.base, pair.tuned, POST, whole=True).info.tokenizer
    assert [tokenizer.decode(ids) for ids in asked] == ["<bos>1999 Hello"] * 2


def test_wrong_latents_are_one_line(run: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["steer", str(run), "--cache", str(cache_folder), "--latent", "12", "--prompt", "x"]) == 2
    assert "there is no latent 12: this crosscoder has latents 0 to 11" in capsys.readouterr().err
    assert cli.main(["steer", str(run), "--latent", "1", "--prompt", "x", "--strengths", "[]"]) == 2
    assert "strengths is an empty list" in capsys.readouterr().err


def test_answers_are_written_in_the_template_that_is_given(whole: ModelPair) -> None:
    model, tokenizer = whole.models[1], whole.info.tokenizer
    plain = answer(model, tokenizer, "Return it.", max_new_tokens=8)
    assert answer(model, tokenizer, "Return it.", max_new_tokens=8, template=tokenizer.chat_template) == plain
    other = "{{ bos_token }}{% for m in messages %}key key {{ m['content'] }}{% endfor %}"
    wanted = tokenizer("key key Return it.", return_tensors="pt")
    tokens = model.generate(**wanted, max_new_tokens=8, do_sample=False, pad_token_id=0)
    said = tokenizer.decode(tokens[0, wanted["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer(model, tokenizer, "Return it.", max_new_tokens=8, template=other) == said


@pytest.mark.parametrize(
    "template, line",
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[7]['content'] }}", "list object has no element 7"),
    ],
)
def test_a_template_that_fails_is_one_line(whole: ModelPair, template: str, line: str) -> None:
    with pytest.raises(InputError, match=rf"the chat template refuses the prompt 'Hi': .*{line}"):
        answer(whole.models[1], whole.info.tokenizer, "Hi", max_new_tokens=2, template=template)


def test_a_prompt_with_an_id_beyond_the_model_is_refused(whole: ModelPair) -> None:
    larger = copy.deepcopy(whole.info.tokenizer)
    larger.add_tokens(["<one>"])
    with pytest.raises(InputError, match=r"token '<one>' with id 320, but the ids of 'Gemma2ForCausalLM' end at 319"):
        answer(whole.models[1], larger, "Hi <one>", max_new_tokens=2)


def test_a_bridge_is_steered_off_the_residual_stream_as_the_model_in_it_is(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = "blocks.1.hook_mlp_out"
    bridge, model = (load_pair(pair.base, pair.tuned, name, whole=True).models[1] for name in (point, POST))
    # The Hugging Face model has this point too, and caches; a bridge generates token by token from the whole text.
    ids = torch.tensor([[2, 10, 20, 30]])
    by_bridge = steered_logits(bridge.original_model, ids, point, use_cache=False)
    by_model = steered_logits(model, ids, point, use_cache=True)
    torch.testing.assert_close(by_bridge[:, 0], by_model[:, 0], rtol=1e-4, atol=1e-5)
    cache = cache_activations(pair.config(tmp_path / "cache", hook_point=point, n_tokens=100))
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.save(tmp_path / "run", provenance=cache_inputs(cache))
    scale_run(tmp_path / "run", cache)
    argv = ["steer", str(tmp_path / "run"), "--cache", str(cache.path), "--latent", "1", "--prompt", "x"]
    assert cli.main([*argv, "--max-new-tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 2
