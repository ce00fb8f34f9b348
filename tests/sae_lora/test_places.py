"""Dictionaries off the residual stream, of other models, of both models at once; and memory that is too little."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import POINT, D, F, archive, fit_config, pair_crosscoder
from safetensors.torch import save_file
from splices import BOS, EOS, IDS, MASK, Shift
from transformers import AutoModelForCausalLM

from crosscoders import Crosscoder, CrosscoderConfig, InputError, load_crosscoder
from crosscoders.common import memory
from crosscoders.models import hooks, points, resume
from crosscoders.models.names import hash_model
from sae_lora import FitConfig, fit, inspect_dictionary, load_dictionary, splice
from sae_lora.cli import main
from sae_lora.dictionaries.frozen import PairSide
from sae_lora.fitting import objective
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.lora.adapter import add_lora
from sae_lora.lora.sidecar import read_sidecar

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def both(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_crosscoder(tmp_path_factory.mktemp("cc") / "cc", pair)


def pairs(pair: Any) -> list[tuple[str, str]]:
    return [("base", pair.base), ("tuned", pair.tuned)]


def config(pair: Any, dictionary: Path, **changes: object) -> FitConfig:
    return fit_config(pair, dictionary, **{"n_tokens": 300, "rank": 2, **changes})


@pytest.mark.parametrize("point", ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"])
def test_a_splice_off_the_residual_stream_is_the_same_in_a_bridge(pair: Any, point: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    plain = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()
    inner = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()
    bridge = TransformerBridge.boot_transformers(pair.base, hf_model=inner, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        clean = plain(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        with splice(plain, Shift(0.5, 0.3, point), keep_ids=[BOS, EOS]) as spliced:
            found = plain(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        with splice(bridge, Shift(0.5, 0.3, point), keep_ids=[BOS, EOS]):
            wanted = bridge(IDS, attention_mask=MASK, return_type="logits")[MASK.bool()]
    assert spliced.fired == {point: 1}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((found - clean).abs().max()) > 1e-3


def test_fit_and_eval_take_an_mlp_dictionary_and_share_the_prefix(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, point = archive(tmp_path / "mlp.npz"), "blocks.1.hook_mlp_out"
    common = ["--data", pair.data, "--context-length", "40", "--n-tokens", "300"]
    flags = ["--model", pair.tuned, "--dictionary", str(file), "--hook-point", point, "--rank", "2", "--lr", "1e-2"]
    assert main(["fit", *flags, *common, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "every pass runs from the bottom" not in said and "needs about" in said
    assert read_sidecar(tmp_path / "run")["layers"] == [2]
    assert main(["eval", str(tmp_path / "run"), *common, "--json"]) == 0
    values = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert values["eval.kl.adapted_spliced"] < values["eval.kl.spliced"] and values[f"eval.l0.{point}.before"] > 0


def test_a_prefix_that_ends_before_the_layer_of_the_dictionary_gives_equal_bits(pair: Any, tmp_path: Path) -> None:
    file, point = archive(tmp_path / "mlp.npz"), "blocks.1.hook_attn_out"
    settings = config(pair, file)
    plan = make_plan(settings, pair.tuned, [(str(file), point)])
    adapted = add_lora(load_model(plan, settings, CPU), [1, 2], rank=2, alpha=1.0)
    dictionaries, batch = load_dictionaries(plan, settings, CPU), next(plan.batches(4, CPU))
    found = []
    start = resume.find_prefix(adapted, points.entry_point(point), batch)
    assert start is not None
    kept = objective.states(adapted, dictionaries[0], batch, plan.keep_ids)
    for prefix, stored in ((None, None), (start, None), (start, kept)):
        adapted.zero_grad()
        total = objective.batch_kl(adapted, dictionaries, batch, plan.keep_ids, prefix=prefix, stored=stored)
        total.backward()
        found.append([total.detach(), *(w.grad for w in adapted.parameters() if w.requires_grad)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)) and float(other[0]) > 0


# ----------------------------------------------------------------------------------------------- both models at once


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_side_with_the_other_model_beside_it_has_the_latents_of_the_pair(pair: Any, both: Path, side: Any) -> None:
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for _, name in pairs(pair)]
    number = ("base", "tuned").index(side)
    settings = config(
        pair,
        both,
        model=pairs(pair)[number][1],
        side=side,
        other_model=pairs(pair)[1 - number][1],
        tokenizer=pair.tuned,
    )
    plan = make_plan(settings, settings.model, [(str(both), None)], side, other=settings.other_model)
    (dictionary,) = load_dictionaries(plan, settings, CPU)
    assert isinstance(dictionary, PairSide)
    x = torch.stack([hooks.run_to(model, [POINT], IDS, MASK)[POINT] for model in models], dim=2)
    crosscoder = load_dictionary(both, side="base").crosscoder
    wanted = crosscoder(x.flatten(0, 1)).view_as(x)[:, :, number]
    kept = torch.isin(IDS, torch.tensor([BOS, EOS])) | (MASK == 0)
    with splice(models[number], dictionary, keep_ids=[BOS, EOS]), hooks.capture(models[number], [POINT]) as seen:
        models[number](input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(seen[POINT][~kept], wanted[~kept])
    assert torch.equal(seen[POINT][kept], x[:, :, number][kept])
    alone = load_dictionary(both, side=side)
    assert not torch.allclose(alone(x[:, :, number].flatten(0, 1)).view_as(wanted)[~kept], wanted[~kept], atol=1e-4)
    assert alone.content_hash() != dictionary.content_hash()
    with pytest.raises(InputError, match="use_cache=False"), splice(models[number], dictionary):
        models[number](input_ids=IDS[:, :2], attention_mask=MASK)


def test_a_crosscoder_over_layers_is_spliced_at_one_and_reads_the_others_of_the_model(
    pair: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()
    d_model, draw = model.config.hidden_size, torch.Generator().manual_seed(0)
    for layer in range(2):
        shapes = {
            "w_enc": (d_model, 5),
            "w_dec": (5, 2, d_model),
            "b_enc": (5,),
            "threshold": (5,),
            "b_dec": (d_model,),
        }
        part = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        save_file({**part, "threshold": part["threshold"].abs()}, tmp_path / f"params_layer_{layer}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hf_hook_point_in": "model.layers.{0,1}.output"}))
    points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    settings = config(pair, tmp_path)
    plan = make_plan(settings, pair.tuned, [(str(tmp_path), points[1])])
    (dictionary,) = load_dictionaries(plan, settings, CPU)
    x = torch.stack([hooks.run_to(model, points, IDS, MASK)[point] for point in points], dim=2)
    wanted = load_crosscoder(tmp_path)(x.flatten(0, 1)).view_as(x)[:, :, 1]
    kept = torch.isin(IDS, torch.tensor([BOS, EOS])) | (MASK == 0)
    with splice(model, dictionary, keep_ids=[BOS, EOS]), hooks.capture(model, [points[1]]) as seen:
        model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(seen[points[1]][~kept], wanted[~kept])
    with pytest.raises(InputError, match=r"reads several layers. Choose one: --hook-point blocks.0.hook_resid_post or"):
        inspect_dictionary(tmp_path)
    with pytest.raises(InputError, match=r"not 'blocks.2.hook_resid_post'. Choose one of them"):
        inspect_dictionary(tmp_path, hook_point="blocks.2.hook_resid_post")
    with pytest.raises(
        InputError, match=r"is a crosscoder over layers, whose latents need .* load_crosscoder, or splice"
    ):
        load_dictionary(tmp_path, hook_point=points[0])


def test_a_fit_with_both_models_names_the_other_and_needs_it(
    pair: Any, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(pair, both, side="tuned", other_model=pair.base), tmp_path / "run")
    assert read_sidecar(tmp_path / "run")["other_model"] == {"name": pair.base, "hash": hash_model(pair.base)}
    common = ["eval", str(tmp_path / "run"), "--data", pair.data, "--n-tokens", "100"]
    assert main([*common, "--json"]) == 0
    assert "eval.kl_closed" in {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert main([*common, "--other-model", pair.tuned]) == 2
    assert "is the model itself" in capsys.readouterr().err.splitlines()[-1]
    for dictionary, changes in ((both, {"side": "both"}), (archive(tmp_path / "x.npz"), {"hook_point": POINT})):
        with pytest.raises(InputError, match="one crosscoder of two models with side base or tuned"):
            fit(config(pair, dictionary, other_model=pair.base, **changes), tmp_path / "o")


# ------------------------------------------------------------------------------------------- another model, no memory


def test_a_dictionary_of_another_model_has_to_be_asked_for(pair: Any, tmp_path: Path) -> None:
    made = Crosscoder(CrosscoderConfig(dict_size=F, activation="relu", d_model=D, n_models=1)).requires_grad_(False)
    entry = {"name": pair.base, "hash": hash_model(pair.base)}
    made.save(tmp_path / "sae", provenance={"cache": {"hook_point": POINT, "base": entry}})
    with pytest.raises(InputError, match="or say --foreign-dictionary"):
        fit(config(pair, tmp_path / "sae"), tmp_path / "run")
    with pytest.raises(InputError, match=r"was trained on .*Leave it out"):
        fit(config(pair, tmp_path / "sae", model=pair.base, tokenizer=pair.tuned, foreign_dictionary=True), tmp_path)
    folder = fit(config(pair, tmp_path / "sae", foreign_dictionary=True), tmp_path / "run")
    assert read_sidecar(folder)["foreign_dictionary"] is True
    assert main(["eval", str(folder), "--data", pair.data, "--n-tokens", "100"]) == 0


def test_too_little_memory_is_one_line_before_weights_load(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = archive(tmp_path / "a.npz")
    flags = ["fit", "--model", pair.tuned, "--dictionary", str(file), "--hook-point", POINT, "--data", pair.data]
    flags += ["--n-tokens", "100", "--rank", "2"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(50_000_000, 100_000_000))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    evaluate = ["eval", str(tmp_path / "run"), "--data", pair.data, "--n-tokens", "100"]
    for command in ([*flags, "--out", str(tmp_path / "other")], evaluate):
        assert main(command) == 3
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: this needs about 15") and "but there are 100.0 MB. Lower --batch-rows" in line
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(50_000_000, 100_000_000))
    for command in ([*flags, "--out", str(tmp_path / "other")], evaluate):
        assert main([*command, "--force"]) == 0
        assert "warning: this needs about 15" in capsys.readouterr().err


def test_a_fit_counts_lora_and_logits_on_paper(pair: Any, tmp_path: Path) -> None:
    from sae_lora.fitting.needs import fit_need

    file = archive(tmp_path / "a.npz")

    def need(**changes: object) -> memory.Need:
        settings = config(pair, file, hook_point=POINT, **changes)
        plan = make_plan(settings, settings.model, [(str(file), POINT)])
        return fit_need(settings, plan, changes.get("layers", [2]), torch.device("cuda"))  # type: ignore[arg-type]

    # q, k, v, o of 16 x 16, 16 x 8, 16 x 8, 16 x 16, three maps of 16 x 24: r (32 + 24 + 24 + 32 + 120)
    assert need(rank=3).gpu - need(rank=2).gpu == 16 * 232
    assert need(rank=3).ram - need(rank=2).ram == 12 * 232
    assert need(layers=[1, 2]).gpu > need().gpu and need(batch_rows=8).gpu > need().gpu
    loaded = AutoModelForCausalLM.from_pretrained(pair.tuned)
    assert need().gpu > 2 * sum(weight.numel() for weight in loaded.parameters())  # bfloat16 on a GPU
