"""Fitting and evaluation: identities, an independent route for every number, resuming, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from crosscoders import CorruptData, InputError
from crosscoders.models import hooks, resume
from crosscoders.text.tokens import Batch
from crosscoders.training.loop import StopRequested
from sae_lora import FitConfig, fit, splice
from sae_lora.cli import main
from sae_lora.dictionaries.frozen import Constant, DictionaryInfo, FrozenDictionary
from sae_lora.dictionaries.loading import load_dictionary
from sae_lora.evaluation import cells
from sae_lora.fitting import loop, objective
from sae_lora.fitting.end_to_end import train_end_to_end, trainable
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.fitting.settings import PRESETS, pair_up
from sae_lora.lora.adapter import add_lora, choose_layers, load_adapter, lora_off
from sae_lora.lora.sidecar import SIDECAR, read_sidecar

D, F = 16, 24
POINT = "blocks.1.hook_resid_post"


class Identity(FrozenDictionary):
    def __init__(self, hook_point: str = POINT) -> None:
        super().__init__(DictionaryInfo("constant", "", hook_point, D, D, {}))
        self.register_buffer("unit", torch.ones(1))

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.unit


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma Scope file in the published layout, for layer 1 of the tiny Gemma-2."""
    folder = tmp_path_factory.mktemp("hub") / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    W_dec = draw.normal(size=(F, D)).astype(np.float32) / D**0.5
    arrays = {
        "W_enc": W_dec.T,
        "W_dec": W_dec,
        "b_enc": np.zeros(F),
        "b_dec": np.zeros(D),
        "threshold": np.full(F, 0.1),
    }
    np.savez(folder / "params.npz", **{name: value.astype(np.float32) for name, value in arrays.items()})
    return folder


def config(pair: Any, scope: Path, **changes: object) -> FitConfig:
    settings: dict[str, object] = {
        "model": pair.tuned, "dictionary": str(scope), "data": pair.data, "n_tokens": 500, "context_length": 40,
        "batch_rows": 4, "rank": 4, "lr": 1e-2, "log_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})  # type: ignore[arg-type]


def opened(settings: FitConfig) -> Any:
    plan = make_plan(settings, settings.model, pair_up(settings.dictionary, settings.hook_point), settings.side)
    device = torch.device("cpu")
    model, dictionaries = load_model(plan, settings, device), load_dictionaries(plan, settings, device)
    return plan, model, dictionaries, list(plan.batches(settings.batch_rows, device))


def batches_of(settings: FitConfig) -> list[Any]:
    return list(opened(settings)[3])


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# --------------------------------------------------------------------------------------------------- identities


def test_an_identity_dictionary_gives_no_kl_and_no_gradient(pair: Any, scope: Path) -> None:
    plan, model, dictionaries, batches = opened(config(pair, scope))
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    for chosen, is_zero in (([Identity()], True), (dictionaries, False)):
        adapted.zero_grad()
        total = objective.batch_kl(adapted, chosen, batches[0], plan.keep_ids)
        total.backward()
        total = total.detach()
        largest = max(float(w.grad.abs().max()) for w in adapted.parameters() if w.grad is not None)
        assert (abs(float(total)) < 1e-6 and largest < 1e-6) == is_zero


def test_kl_in_chunks_equals_kl_at_once_and_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 11, D, generator=draw).unbind()
    W = torch.randn(D, 30, generator=draw)
    student.requires_grad_(True)

    def head(x: Tensor) -> Tensor:
        return torch.tanh(x @ W / 3) * 3

    wanted = torch.nn.functional.kl_div(head(student).log_softmax(1), head(teacher).softmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(wanted * 2, student)
    for chunk in (1, 4, 100):
        found = objective.kl_total(teacher, student, head, chunk)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found * 2, student)[0], gradient)


def test_the_kl_of_a_batch_equals_that_of_whole_logits_without_padding(pair: Any, scope: Path) -> None:
    """Soft caps, padding and splice included; and never the logits of more than a chunk."""
    plan, model, dictionaries, batches = opened(config(pair, scope))
    batch = next(batch for batch in batches if not batch.attention_mask.all())
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    used = batch.attention_mask.bool()
    with torch.no_grad(), lora_off(adapted):
        p = resume.logits(adapted, batch)[used]
    with splice(adapted, dictionaries, keep_ids=plan.keep_ids):
        q = resume.logits(adapted, batch)[used]
    wanted = torch.nn.functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="sum")
    weights = [w for w in adapted.parameters() if w.requires_grad]
    slopes = torch.autograd.grad(wanted, weights)
    widths: list[int] = []
    head = adapted.get_base_model().lm_head
    handle = head.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[0] * out.shape[1]))
    found = objective.batch_kl(adapted, dictionaries, batch, plan.keep_ids, chunk_tokens=5)
    handle.remove()
    torch.testing.assert_close(found, wanted)
    for slope, other in zip(torch.autograd.grad(found, weights), slopes, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-6)
    assert max(widths) == 5 and float(wanted.detach()) > 0


@pytest.mark.parametrize("kind", ["Gemma2", "Llama", "GPT2", "OPT", "Cohere", "Granite", "Mixtral"])
def test_the_head_alone_makes_the_logits_of_every_architecture(kind: str) -> None:
    """Scales, caps and biases of the logits; a mixture of experts, whose head reads more than hidden states."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    more = {"OPT": {"word_embed_proj_dim": 8}}.get(kind, {} if kind == "GPT2" else {"num_key_value_heads": 2})
    made = getattr(transformers, f"{kind}Config")(**sizes, **more, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    ids = torch.arange(3, 13).view(2, 5)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), np.arange(2))
    resume.require_head(model, batch)
    stack = hooks.decoder_stack(model)
    assert "forward" not in vars(stack)
    wrapped = vars(stack)["forward"] = stack.forward  # as other libraries do
    with torch.no_grad():
        final, wanted = resume.final_states(model, batch), resume.logits(model, batch)
        with resume.head_alone(model) as to_logits:
            torch.testing.assert_close(to_logits(final[batch.scored]), wanted[batch.scored])
    assert vars(stack)["forward"] is wrapped


def test_a_model_whose_logits_need_more_than_final_states_is_refused(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(pair, scope)
    _, model, _, batches = opened(settings)
    resume.require_head(model, batches[0])
    real = type(model).forward

    def shifted(self: Any, input_ids: Tensor, **given: Any) -> Any:
        out = real(self, input_ids=input_ids, **given)
        out.logits = out.logits + input_ids.shape[1]
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(InputError, match="Gemma2ForCausalLM does not make its logits from its final hidden states"):
        fit(settings, tmp_path / "run")


@pytest.mark.parametrize(
    "points",
    [[POINT], ["blocks.1.hook_resid_pre"], ["blocks.0.hook_resid_pre"], ["blocks.0.hook_resid_post", POINT]],
)
def test_a_shared_prefix_and_stored_states_give_equal_bits(pair: Any, scope: Path, points: list[str]) -> None:
    plan, model, _, batches = opened(config(pair, scope))
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found = []
    chosen = [Constant(point, torch.full((D,), 1.0 + i)) for i, point in enumerate(points)]
    prefix = resume.find_prefix(adapted, points[0], batches[0])
    stored = objective.states(adapted, chosen[0], batches[0], plan.keep_ids)
    assert prefix is not None
    for known in ({}, {"prefix": prefix}, {"prefix": prefix, "stored": stored}, {"stored": stored}):
        adapted.zero_grad()
        total = objective.batch_kl(adapted, chosen, batches[0], plan.keep_ids, **known)
        total.backward()
        found.append([total.detach(), *(w.grad for w in adapted.parameters() if w.requires_grad)])
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])
    assert float(found[0][0]) > 0


def test_a_bfloat16_model_is_fitted_with_float32_weights_and_kl(pair: Any, scope: Path, tmp_path: Path) -> None:
    """What a GPU runs by default."""
    settings = config(pair, scope, model_dtype="bfloat16")
    plan, model, dictionaries, batches = opened(settings)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    prefix = resume.find_prefix(adapted, POINT, batches[0])
    stored = objective.states(adapted, dictionaries[0], batches[0], plan.keep_ids)
    assert prefix is not None and {weight.dtype for weight in trained} == {torch.float32}
    found = []
    for known in ({}, {"prefix": prefix}, {"prefix": prefix, "stored": stored}):
        total = objective.batch_kl(adapted, dictionaries, batches[0], plan.keep_ids, **known)
        found.append([total.detach(), *torch.autograd.grad(total, trained)])
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])
    exact_plan, exact, *_ = opened(config(pair, scope))
    wanted = float(objective.batch_kl(exact, dictionaries, batches[0], exact_plan.keep_ids))
    assert found[0][0].dtype == torch.float32 and float(found[0][0]) == pytest.approx(wanted, rel=0.05)
    same = objective.batch_kl(adapted, [Identity()], batches[0], plan.keep_ids)
    assert float(same.detach()) == 0
    fit(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < lines[0]["kl"]


# ---------------------------------------------------------------------------------------------------- objective


def test_the_paper_recipe_equals_a_straightforward_loop(pair: Any, scope: Path, tmp_path: Path) -> None:
    """Published objective, step by step: batchmean KL over packed sequences, clip 1, AdamW; no dropout."""
    settings = config(pair, scope, pack=True, batch_rows=2, loss="sum", alpha=2.0, n_tokens=320, lr=1e-3, clip_norm=1.0)
    folder = fit(settings, tmp_path / "run")
    _, model, (dictionary,), batches = opened(settings)
    assert {batch.ids.shape for batch in batches} == {(2, 40)} and len(batches) == 4
    target = re.compile(r"model\.layers\.2\..*_proj")
    loop_config = peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=target.pattern, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    student = peft.get_peft_model(model, loop_config).eval()
    optimizer = torch.optim.AdamW([w for w in student.parameters() if w.requires_grad], lr=1e-3, weight_decay=0.01)
    layer = student.get_base_model().model.layers[1]
    for batch in batches:
        with torch.no_grad(), student.disable_adapter():
            p = student(input_ids=batch.ids).logits.softmax(-1)
        special = torch.isin(batch.ids, torch.tensor([0, 1, 2]))[..., None]
        handle = layer.register_forward_hook(
            lambda _m, _a, x, special=special: torch.where(special, x, dictionary(x.flatten(0, 1)).view_as(x))
        )
        q = student(input_ids=batch.ids).logits.log_softmax(-1)
        handle.remove()
        loss = torch.nn.functional.kl_div(q, p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    wanted = {name: w for name, w in student.state_dict().items() if "lora_" in name}
    found = {name.replace(".weight", ".default.weight"): w for name, w in adapter_weights(folder).items()}
    assert found.keys() == wanted.keys() and len(found) == 14
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    assert max(float(w.abs().max()) for name, w in found.items() if "lora_B" in name) > 1e-3


def test_only_layers_after_the_dictionary_are_adapted_unless_asked(pair: Any, scope: Path) -> None:
    plan, *_ = opened(config(pair, scope))
    assert choose_layers("after", plan.infos, 3) == [2] and choose_layers("all", plan.infos, 3) == [0, 1, 2]
    assert choose_layers([2, 0], plan.infos, 3) == [0, 2]
    with pytest.raises(InputError, match="layers has 3"):
        choose_layers([3], plan.infos, 3)
    with pytest.raises(InputError, match="no layer is after"):
        choose_layers("after", plan.infos, 2)


# ------------------------------------------------------------------------------------------------------ running


def test_fit_and_eval_run_offline_and_close_a_part_of_the_kl(
    pair: Any, scope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = ["--data", pair.data, "--context-length", "40", "--batch-rows", "4", "--n-tokens", "500"]
    flags = ["--model", pair.tuned, "--dictionary", str(scope), "--rank", "4", "--lr", "1e-2", "--out", str(run)]
    assert main(["fit", *flags, *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "fit"
    assert main(["eval", str(run), *common, "--json", "--out", str(tmp_path / "eval.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    values = {row["name"]: row for row in printed["rows"]}
    assert json.loads((tmp_path / "eval.json").read_text())["rows"] == printed["rows"]
    closed = values["eval.kl_closed"]
    assert 0 < closed["low"] < closed["value"] < closed["high"] < 1
    assert values["eval.kl.plain"]["value"] == 0 and values["eval.top1.plain"]["value"] == 1
    assert values[f"eval.l0.{POINT}.before"]["value"] == values[f"eval.l0.{POINT}.after"]["value"] > 0  # LoRA is after
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < lines[0]["kl"] or len(lines) == 1
    assert main(["eval", str(run), *common]) == 0
    assert "adapted_spliced" in capsys.readouterr().out


def test_two_dictionaries_are_fitted_and_measured_together(
    pair: Any, scope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lower = tmp_path / "layer_0" / "width_16k" / "average_l0_9"
    lower.mkdir(parents=True)
    (lower / "params.npz").write_bytes((scope / "params.npz").read_bytes())
    folder = fit(config(pair, scope, dictionary=[str(scope), str(lower)]), tmp_path / "run")
    sidecar = read_sidecar(folder)
    assert [entry["hook_point"] for entry in sidecar["dictionaries"]] == ["blocks.0.hook_resid_post", POINT]
    assert sidecar["layers"] == [1, 2]  # after the lower one
    assert main(["eval", str(folder), "--data", pair.data, "--n-tokens", "200", "--json"]) == 0
    values = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert values["eval.l0.blocks.0.hook_resid_post.before"] == values["eval.l0.blocks.0.hook_resid_post.after"]
    assert values[f"eval.fve.{POINT}.before"] != values[f"eval.fve.{POINT}.after"]  # LoRA on layer 1 moves its input


def test_an_interrupted_fit_goes_on_with_the_same_bits(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(pair, scope, dropout=0.2, epochs=2, store="memory")
    whole = adapter_weights(fit(settings, tmp_path / "whole"))
    real, calls = loop.take_step, []
    stop_after = len(batches_of(settings)) + 3  # in the second epoch

    def stopping(*args: Any) -> Any:
        import os
        import signal

        calls.append(args)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(StopRequested, match=f"step {stop_after}"):
        fit(settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / "adapter").exists()
    found = adapter_weights(fit(settings, tmp_path / "cut"))
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    n_lines = [len((tmp_path / name / "train.jsonl").read_text().splitlines()) for name in ("whole", "cut")]
    assert n_lines[0] == n_lines[1]
    assert fit(settings, tmp_path / "cut") == tmp_path / "cut" / "adapter"  # complete already
    with pytest.raises(InputError, match=r"holds a run with rank = 4, now 5"):
        fit(config(pair, scope, dropout=0.2, rank=5), tmp_path / "cut")


@pytest.mark.parametrize("layers", ["after", "all"])
def test_stored_states_change_no_bit_of_a_fit_and_serve_other_fits(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    common: dict[str, object] = {"epochs": 2, "layers": layers, "lr_decay_fraction": 0.5}
    wanted = adapter_weights(fit(config(pair, scope, **common), tmp_path / "none"))
    disk = common | {"store": "disk", "store_folder": str(tmp_path / "states")}
    for name, how in (("memory", common | {"store": "memory"}), ("disk", disk)):
        found = adapter_weights(fit(config(pair, scope, **how), tmp_path / name))
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
    monkeypatch.setattr("sae_lora.fitting.stored.states", None)  # the model is not run for them again
    fit(config(pair, scope, **disk, rank=2), tmp_path / "other")
    with monkeypatch.context() as patched, pytest.raises(InputError, match="states that differ in bits"):
        patched.setattr("sae_lora.fitting.stored.final_states", lambda *given: resume.final_states(*given) + 1)
        fit(config(pair, scope, **disk, rank=3), tmp_path / "unlike")
    damaged = next((tmp_path / "states").glob("*/00000001.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptData, match="00000001"):
        fit(config(pair, scope, **disk, rank=3), tmp_path / "third")


def test_every_epoch_takes_all_batches_and_later_ones_in_other_orders() -> None:
    order = loop.batch_order(20, 3, seed=0)
    epochs = [order[:20], order[20:40], order[40:]]
    assert epochs[0] == list(range(20)) and all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert epochs[1] != epochs[0] and epochs[2] not in epochs[:2]
    assert loop.batch_order(20, 3, seed=1)[20:] != order[20:]


def test_the_rate_falls_linearly_at_the_end_if_asked(pair: Any, scope: Path) -> None:
    settings = config(pair, scope, lr=1.0, lr_decay_fraction=0.4)
    assert [settings.lr_at(step, 10) for step in range(10)] == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert config(pair, scope, lr=1.0).lr_at(9, 10) == 1.0


def test_a_run_does_not_go_on_with_another_dictionary_at_the_same_path(pair: Any, scope: Path, tmp_path: Path) -> None:
    lower = tmp_path / "layer_1" / "width_16k" / "x"
    lower.mkdir(parents=True)
    arrays = dict(np.load(scope / "params.npz"))
    np.savez(lower / "params.npz", **arrays)
    folder = fit(config(pair, lower), tmp_path / "run")
    model, dictionary = shutil.copytree(pair.tuned, tmp_path / "m"), tmp_path / "m" / "layer_1" / "width_16k" / "x"
    shutil.copytree(lower, dictionary)
    assert fit(config(pair, dictionary, model=str(model)), tmp_path / "run") == folder  # moved, and the same
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match="holds a run with model = "):
        fit(config(pair, lower, model=str(model)), tmp_path / "run")
    np.savez(lower / "params.npz", **arrays | {"b_dec": arrays["b_dec"] + 1})
    with pytest.raises(InputError, match=r"holds a run with dictionaries\.blocks\.1\.hook_resid_post\.hash"):
        fit(config(pair, lower), tmp_path / "run")


# --------------------------------------------------------------------------------------------------- end to end


def training_sae(**changes: object) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_in": D, "d_sae": F, "k": 6, "apply_b_dec_to_input": True, **changes}
    return TopKTrainingSAE(TopKTrainingSAEConfig(**settings))


def with_weak_latents() -> Any:
    sae = training_sae()
    with torch.no_grad():
        sae.W_enc[:, : F // 2] *= 0.1  # often positive, hardly ever among the k largest
    return sae


@pytest.mark.parametrize("auxiliary", [0.0, 0.5])
def test_end_to_end_training_equals_a_straightforward_loop(pair: Any, scope: Path, auxiliary: float) -> None:
    plan, model, _, batches = opened(config(pair, scope))
    make = with_weak_latents if auxiliary else training_sae
    dictionary, sae = trainable(make(), POINT), make()
    known = {"lr_at": lambda step: 1e-2 / (1 + step), "aux_coefficient": auxiliary, "dead_after_tokens": 1}
    steps = list(train_end_to_end(dictionary, model, batches, plan.keep_ids, **known))
    since_fired, n_revived = torch.zeros(F), 0
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    layer = hooks.decoder_layers(model)[1]
    for number, batch in enumerate(batches):
        p = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits.detach().softmax(-1)
        special = torch.isin(batch.ids, torch.tensor([0, 1, 2]))[..., None]
        seen: list[Tensor] = []

        def put(_m: Any, _a: Any, x: Tensor, special: Tensor = special, seen: list[Tensor] = seen) -> Tensor:
            f = sae.encode(x)
            seen.extend((x[~special[..., 0]], f[~special[..., 0]]))
            return torch.where(special, x, sae.decode(f))

        handle = layer.register_forward_hook(put)
        q = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
        handle.remove()
        kl = torch.nn.functional.kl_div(q, p, reduction="none").sum(-1)[batch.attention_mask.bool()].mean()
        assert steps[number].kl == pytest.approx(float(kl.detach()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        optimizer.zero_grad()
        loss, dead = kl, (since_fired >= 1).nonzero()[:, 0].tolist()
        if auxiliary and dead:
            x, f = seen
            err = (x - sae.decode(f)).detach()
            pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            if sae.cfg.rescale_acts_by_decoder_norm:
                pre = pre * sae.W_dec.norm(dim=1)
            missed = torch.zeros(())
            for t in range(len(x)):
                first = sorted(dead, key=lambda j, t=t: -pre[t, j].item())[: D // 2]
                z = torch.zeros(F).index_put((torch.tensor(first),), pre[t, first].relu())
                missed = missed + (err[t] - (sae.decode(z[None]) - sae.decode(0 * z[None]))[0]).square().sum()
                n_revived += int((z > 0).sum())
            loss = kl + auxiliary * missed / (err - err.mean(dim=0)).square().sum()
        since_fired = torch.where((seen[1] > 0).any(dim=0), 0, since_fired + len(seen[0]))
        loss.backward()
        assert all(w.grad is not None and float(w.grad.abs().max()) > 0 for w in sae.parameters())
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
    assert len(steps) == len(batches)
    start = dict(make().named_parameters())
    for (name, found), wanted in zip(dictionary.sae.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)
        assert float((found - start[name]).abs().max().detach()) > 1e-3  # every parameter moves
    assert (n_revived > 100) == bool(auxiliary)
    assert all(weight.grad is None for weight in model.parameters())


def test_end_to_end_training_lowers_the_kl(pair: Any, scope: Path) -> None:
    plan, model, _, batches = opened(config(pair, scope))
    dictionary = trainable(training_sae(), POINT)
    steps = list(train_end_to_end(dictionary, model, batches[:1] * 30, plan.keep_ids, lr_at=lambda _: 1e-2))
    assert steps[-1].kl < 0.7 * steps[0].kl


def test_an_sae_whose_sparsity_needs_a_term_is_not_trained_end_to_end() -> None:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    with pytest.raises(InputError, match="only 'topk' is"):
        trainable(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F)), POINT)


# --------------------------------------------------------------------------------------------------- evaluation


def test_lora_is_off_inside_and_on_again_after_nesting_and_errors(pair: Any, scope: Path) -> None:
    _, model, _, (batch, *_) = opened(config(pair, scope))
    plain = resume.logits(model, batch)
    adapted = add_lora(model, [0, 2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    on = resume.logits(adapted, batch)
    assert not torch.allclose(on, plain, atol=1e-3)
    with pytest.raises(ValueError, match="planted"), lora_off(adapted):
        with lora_off(adapted):
            torch.testing.assert_close(resume.logits(adapted, batch), plain)
        torch.testing.assert_close(resume.logits(adapted, batch), plain)  # the inner one does not end the outer
        raise ValueError("planted")
    assert torch.equal(resume.logits(adapted, batch), on)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_every_cell_equals_a_plain_loop(pair: Any, scope: Path) -> None:
    plan, model, (dictionary,), batches = opened(config(pair, scope))
    adapted = add_lora(model, [0, 2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    n = len(plan.rows.offsets) - 1
    found = cells.measure(adapted, [dictionary], lambda: iter(batches), n, plan.keep_ids)
    spliced = lambda x: dictionary(x.flatten(0, 1)).view_as(x)  # noqa: E731
    xs = []
    for i in range(n):
        ids = torch.from_numpy(plan.rows.ids[plan.rows.offsets[i] : plan.rows.offsets[i + 1]]).long()[None]
        with torch.no_grad(), adapted.disable_adapter(), hooks.capture(adapted, [POINT]) as seen:
            adapted(input_ids=ids)
        xs.append(seen[POINT][~torch.isin(ids, torch.tensor([0, 1, 2]))])
    mean = torch.cat(xs).mean(dim=0)
    edits = {"zero_ablated": torch.zeros_like, "mean_ablated": mean.expand_as}
    for i in (0, 5, n - 1):
        ids = torch.from_numpy(plan.rows.ids[plan.rows.offsets[i] : plan.rows.offsets[i + 1]]).long()[None]
        special = torch.isin(ids, torch.tensor([0, 1, 2]))[..., None]
        assert found.n_tokens[i] == ids.shape[1] - 1
        log_p = None
        for c, cell in enumerate(cells.CELLS):
            edit = (lambda x: x) if cell in ("plain", "adapted") else edits.get(cell, spliced)

            def keep(x: Tensor, edit: Any = edit, special: Tensor = special) -> Tensor:
                return torch.where(special, x, edit(x))

            with torch.no_grad(), hooks.replace(adapted, POINT, keep):
                if cell.startswith("adapted"):
                    loss = adapted(input_ids=ids, labels=ids).loss
                    log_q = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
                else:
                    with adapted.disable_adapter():
                        loss = adapted(input_ids=ids, labels=ids).loss
                        log_q = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
            log_p = log_q if log_p is None else log_p
            kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
            top1 = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            wanted = [float(loss) * (ids.shape[1] - 1), float(kl), float(top1)]
            np.testing.assert_allclose(found.sums[c, :, i], wanted, rtol=2e-4, atol=2e-4, err_msg=cell)


def test_an_adapter_with_b_zero_leaves_both_cells_as_they_are(pair: Any, scope: Path) -> None:
    plan, model, dictionaries, batches = opened(config(pair, scope))
    n = len(plan.rows.offsets) - 1
    adapted = add_lora(model, [0, 1, 2], rank=2, alpha=1.0)
    found = cells.measure(adapted, dictionaries, lambda: iter(batches), n, plan.keep_ids)
    cell = {name: found.sums[i] for i, name in enumerate(cells.CELLS)}
    assert np.array_equal(cell["adapted"], cell["plain"])
    assert np.array_equal(cell["adapted_spliced"], cell["spliced"])
    values = {row["name"]: row["value"] for row in cells.eval_rows(found)}
    assert values["eval.kl_closed"] == 0 and values["eval.kl.spliced"] > 0


def test_shares_and_intervals_on_paper() -> None:
    """Two sequences of 1 and 3 tokens. Means: plain 1, spliced 2, adapted 1.1, both 1.4, zero 5, mean 3."""
    sums = np.zeros((6, 3, 2))
    for c, value in enumerate((1.0, 2.0, 1.1, 1.4, 5.0, 3.0)):
        sums[c, 0] = value * np.array([1, 3])
        sums[c, 1] = (value - 1) * np.array([1, 3])
    values = {row["name"]: row for row in cells.eval_rows(cells.Measured(sums, np.array([1, 3]), {}))}
    wanted = {
        "ce.spliced": 2.0, "ce_gap.adapted": 0.1, "gap_closed": 0.6, "kl_closed": 0.6,
        "loss_recovered.zero.spliced": 0.75, "loss_recovered.zero.adapted_spliced": 0.9,
        "loss_recovered.mean.spliced": 0.5,
    }  # fmt: skip
    for name, value in wanted.items():
        row = values[f"eval.{name}"]
        np.testing.assert_allclose([row["value"], row["low"], row["high"]], value)  # every resample has this mean
        assert row["n"] == 4
    sums[1, 0] = sums[0, 0] - 1  # the splice helps: no gap, so no share of it
    assert "eval.gap_closed" not in {r["name"] for r in cells.eval_rows(cells.Measured(sums, np.array([1, 3]), {}))}


# ------------------------------------------------------------------------------------------------------- folder


@pytest.fixture(scope="module")
def fitted(pair: Any, scope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config(pair, scope), tmp_path_factory.mktemp("fit") / "run")


def copied(fitted: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(fitted, to))


def test_plain_peft_reads_the_adapter_to_equal_logits(pair: Any, scope: Path, fitted: Path) -> None:
    load = lambda: AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()  # noqa: E731
    ids = torch.tensor([[2, 7, 8, 9, 11]])
    dictionary = load_dictionary(scope)
    ours, plain = load_adapter(load(), fitted, [dictionary]), peft.PeftModel.from_pretrained(load(), fitted).eval()
    with splice(ours, dictionary), splice(plain, dictionary):
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_sidecar_names_dictionary_positions_and_model(scope: Path, fitted: Path) -> None:
    sidecar = read_sidecar(fitted.parent)
    (entry,) = sidecar["dictionaries"]
    assert entry["hash"] == load_dictionary(scope).content_hash()
    assert (entry["hook_point"], entry["dtype"], sidecar["layers"]) == (POINT, "float32", [2])
    assert sidecar["kept_positions"] == {"padding": True, "token_ids": [0, 1, 2]}


def test_adapters_without_their_dictionary_are_refused(pair: Any, scope: Path, fitted: Path, tmp_path: Path) -> None:
    model, dictionary = torch.nn.Linear(1, 1), load_dictionary(scope)
    with pytest.raises(InputError, match="needs a dictionary at"):
        load_adapter(model, fitted, [])
    with pytest.raises(InputError, match="was fitted around"):
        load_adapter(model, fitted, [Identity()])
    with pytest.raises(InputError, match="knows no dictionary at"):
        load_adapter(model, fitted, [dictionary, Identity("blocks.0.hook_resid_post")])
    bare = copied(fitted, tmp_path / "bare")
    (bare / SIDECAR).unlink()
    with pytest.raises(InputError, match=r"an adapter without splice\.json"):
        load_adapter(model, bare, [dictionary])
    changed = copied(fitted, tmp_path / "changed")
    data = bytearray((changed / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CorruptData, match="is not the file that"):
        load_adapter(model, changed, [dictionary])
    with pytest.raises(InputError, match="holds no adapter"):
        read_sidecar(tmp_path)


def test_wrong_input_is_one_line_before_the_model_loads(
    pair: Any, scope: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    narrow = tmp_path / "narrow.npz"
    np.savez(
        narrow, W_enc=np.ones((3, 4)), W_dec=np.ones((4, 3)), b_enc=np.ones(4), b_dec=np.ones(3), threshold=np.ones(4)
    )
    fits = ["fit", "--model", pair.tuned, "--data", pair.data, "--n-tokens", "100", "--out", str(tmp_path / "o")]
    at = ["--hook-point", POINT]
    for flags, said in (
        ([*fits, "--dictionary", str(narrow), *at], "d_model 3 but model"),
        ([*fits, "--dictionary", str(narrow)], "does not say its hook point"),
        ([*fits, "--dictionary", str(scope), "--layers", "[7]"], "layers has 7"),
        ([*fits, "--dictionary", str(scope), "--rank", "0"], "rank is 0"),
        ([*fits, "--dictionary", str(scope), "--store", "disk"], "disk needs a folder"),
        ([*fits, "--dictionary", f'["{scope}", "{scope}"]'], "two dictionaries sit at"),
        ([*fits, "--dictionary", str(scope), "--hook-point", f'["{POINT}", "{POINT}"]'], "1 dictionaries and 2 hook"),
        ([*fits, "--dictionary", str(scope), "--side", "base"], "is for crosscoders"),
        ([*fits, "--dictionary", str(tmp_path / "none")], "there is no dictionary"),
        (["eval", str(tmp_path), "--data", pair.data], "holds no adapter"),
        (["eval", str(fitted), "--data", pair.data, "--n-tokens", "100", "--model", pair.base], "is not the one that"),
    ):
        assert main(flags) == 2
        captured = capsys.readouterr().err.strip().splitlines()
        assert said in captured[-1] and captured[-1].startswith("error: "), captured


def test_the_table_of_the_preset_has_the_values_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "math.md").read_text()
    table = text[text.index("**Preset `paper`**") :].split("## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|$", table, re.M))
    assert shown.keys() == PRESETS["paper"].keys()
    for key, value in PRESETS["paper"].items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        assert (float(shown[key].replace(",", "")) == value) if number else (shown[key] == str(value).lower()), key
