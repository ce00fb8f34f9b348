"""Controls in place of a dictionary, and the cheaper correctors: identities, independent routes, what is refused."""

import json
import os
import signal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fits import opened
from torch import Tensor

from crosscoders import CrosscoderConfig, InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import predictions, resume
from crosscoders.training.loop import StopRequested
from sae_lora import FitConfig, fit, load_adapter, load_corrector, load_dictionary, splice
from sae_lora.cli import main
from sae_lora.dictionaries.controls import Control, decoder_of, unit_noise, with_control
from sae_lora.dictionaries.frozen import CrosscoderSide, DictionaryInfo, FrozenDictionary, Sae
from sae_lora.dictionaries.settings import ControlKind
from sae_lora.fitting import loop, objective
from sae_lora.fitting.correctors import start, trainable_copy
from sae_lora.lora.sidecar import read_sidecar

D, F = 16, 24
POINT = "blocks.1.hook_resid_post"
X = torch.randn(9, D, generator=torch.Generator().manual_seed(4))


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    W_dec = draw.normal(size=(F, D)) * np.linspace(0.1, 0.6, F)[:, None]
    found = {
        "W_enc": W_dec.T, "W_dec": W_dec, "b_enc": np.zeros(F), "b_dec": draw.normal(size=D),
        "threshold": np.full(F, 0.1),
    }  # fmt: skip
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays())
    return folder


def jump_relu() -> FrozenDictionary:
    info = DictionaryInfo("gemma-scope", "here", POINT, D, F, {"gate": "jumprelu", "apply_b_dec_to_input": False})
    return Sae(info, {name: torch.from_numpy(value) for name, value in arrays().items()})


def config(pair: Any, scope: Path, **changes: object) -> FitConfig:
    settings: dict[str, object] = {
        "model": pair.tuned, "dictionary": str(scope), "data": pair.data, "n_tokens": 400, "context_length": 40,
        "batch_rows": 4, "lr": 1e-2, "log_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- controls


def test_controls_keep_the_latents_and_change_what_they_name() -> None:
    """Each x_hat by its definition, from the arrays."""
    source, w = jump_relu(), {name: torch.from_numpy(value) for name, value in arrays().items()}
    pre = X @ w["W_enc"]
    latents = torch.relu(pre) * (pre > w["threshold"])
    assert 0.2 < (latents > 0).float().mean() < 0.8
    kinds = [kind for kind in get_args(ControlKind) if kind != "none"]
    found = {kind: Control(source, kind, 5) for kind in kinds}
    for control in found.values():
        torch.testing.assert_close(control.reconstruct(X)[0], latents)
    assert torch.equal(found["identity"](X), X)
    torch.testing.assert_close(found["no-latents"](X), w["b_dec"].expand_as(X))
    err = latents @ w["W_dec"] + w["b_dec"] - X
    torch.testing.assert_close((found["noise"](X) - X).norm(dim=1), err.norm(dim=1))
    sigma = found["shuffled-decoder"].permutation
    assert sorted(sigma.tolist()) == list(range(F)) and (sigma != torch.arange(F)).sum() > F / 2
    torch.testing.assert_close(found["shuffled-decoder"](X), latents @ w["W_dec"][sigma] + w["b_dec"])
    W_random = decoder_of(found["random-decoder"])
    torch.testing.assert_close(W_random.norm(dim=1), w["W_dec"].norm(dim=1))
    assert torch.cosine_similarity(W_random, w["W_dec"]).abs().mean() < 0.4  # E|cos| in 16 dimensions is 0.2
    torch.testing.assert_close(found["random-decoder"](X), latents @ W_random + w["b_dec"])
    torch.testing.assert_close(decoder_of(source), w["W_dec"])  # the dictionary itself is as it was


def test_a_random_decoder_leaves_selection_by_decoder_norm_alone() -> None:
    """A crosscoder selects by f times the sum of norms over its models; those are kept model by model."""
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=F, k=4, d_model=D, n_models=2))
    crosscoder.init_weights_(norm=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        crosscoder.W_dec.mul_(torch.linspace(0.2, 2, F)[:, None, None])
        crosscoder.threshold.fill_(0.5)
    source = CrosscoderSide(DictionaryInfo("crosscoder", "", POINT, D, F, {}, "tuned"), crosscoder)
    wanted = source.encode(X)
    assert 0 < (wanted > 0).float().mean() < 0.5
    for kind in ("random-decoder", "shuffled-decoder"):
        control = Control(source, kind, 0)
        torch.testing.assert_close(control.encode(X), wanted)
        assert not torch.allclose(control(X), source(X), atol=0.1)


def test_noise_is_a_function_of_the_token_and_looks_isotropic() -> None:
    x = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0))
    u = unit_noise(x, 3)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(len(x)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unit_noise(x[order], 3), u[order])
    torch.testing.assert_close(unit_noise(x[:1], 3), u[:1])
    # Means have standard error 1 / sqrt(6 * 20,000) = .003, entries of the covariance and of E[u x] less than .007.
    assert u.mean(dim=0).abs().max() < 0.015
    assert (u.T @ u / len(u) - torch.eye(6) / 6).abs().max() < 0.01
    assert (u.T @ x / len(x)).abs().max() < 0.015
    near = x.clone()
    near[:, 0] = torch.nextafter(near[:, 0], torch.full_like(near[:, 0], torch.inf))
    for other in (unit_noise(near, 3), unit_noise(x, 4)):
        assert abs(float((u * other).sum(dim=1).mean())) < 0.015  # 1 if they were equal


def test_noise_takes_no_gradient_and_identity_takes_all_of_it() -> None:
    x = X.clone().requires_grad_(True)
    for kind in ("noise", "identity"):
        (gradient,) = torch.autograd.grad(Control(jump_relu(), kind, 0)(x).sum(), x)
        assert torch.equal(gradient, torch.ones_like(X))


def test_fitting_around_the_identity_has_no_kl_and_no_gradient(pair: Any, scope: Path) -> None:
    for control, is_zero in (("identity", True), ("noise", False)):
        for corrector in ("lora", "mean-scale", "affine"):
            settings = config(pair, scope, control=control, corrector=corrector)
            plan, model, dictionaries, (batch, *_) = opened(settings)
            fitted = start(settings, model, dictionaries, [2])
            total = objective.batch_kl(fitted.model, fitted.dictionaries, batch, plan.keep_ids)
            total.backward()
            largest = max(float(w.grad.abs().max()) for w in fitted.weights if w.grad is not None)
            assert (abs(float(total.detach())) < 1e-5 and largest < 1e-4) == is_zero, (control, corrector, largest)


# --------------------------------------------------------------------------------------------------- correctors


def test_every_corrector_starts_at_the_plain_splice_and_trains_what_it_says(pair: Any, scope: Path) -> None:
    n_weights = {"lora": 0, "mean-scale": D + 1, "affine": D * D + D, "sae": 2 * D * F + D + F}
    for corrector, n in n_weights.items():
        settings = config(pair, scope, corrector=corrector)
        plan, model, dictionaries, (batch, *_) = opened(settings)
        with torch.no_grad(), splice(model, dictionaries, keep_ids=plan.keep_ids):
            wanted = resume.logits(model, batch)
        fitted = start(settings, model, dictionaries, [2])
        with torch.no_grad(), splice(fitted.model, fitted.dictionaries, keep_ids=plan.keep_ids):
            assert torch.equal(resume.logits(fitted.model, batch), wanted)
        assert corrector == "lora" or sum(w.numel() for w in fitted.weights) == n
        objective.batch_kl(fitted.model, fitted.dictionaries, batch, plan.keep_ids).backward()
        assert any(w.grad is not None and float(w.grad.abs().max()) > 0 for w in fitted.weights)
        assert all(weight.grad is None for dictionary in dictionaries for weight in dictionary.parameters())


def test_an_affine_map_after_a_decoder_is_another_decoder(pair: Any, scope: Path) -> None:
    """The ladder is nested: W_dec (I + W) and b_dec (I + W) + shift; mean and scale is W = scale * I."""
    settings = config(pair, scope, corrector="affine")
    _, model, (dictionary,), _ = opened(settings)
    (affine,) = start(settings, model, [dictionary], []).dictionaries
    (scaled,) = start(config(pair, scope, corrector="mean-scale"), model, [dictionary], []).dictionaries
    w = {name: torch.from_numpy(value) for name, value in arrays().items()}
    with torch.no_grad():
        affine.W.normal_(std=0.3)  # type: ignore[union-attr,operator]
        affine.shift.normal_()  # type: ignore[union-attr,operator]
        scaled.scale.fill_(0.5)  # type: ignore[union-attr,operator]
        scaled.shift.fill_(2.0)  # type: ignore[union-attr,operator]
        grown: Tensor = torch.eye(D) + affine.W  # type: ignore[operator]
        decoder = {"W_dec": w["W_dec"] @ grown, "b_dec": w["b_dec"] @ grown + affine.shift}
        torch.testing.assert_close(affine(X), Sae(dictionary.info, {**w, **decoder})(X), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scaled(X), 1.5 * dictionary(X) + 2)


def test_affine_equals_a_plain_loop(pair: Any, scope: Path, tmp_path: Path) -> None:
    """The same KL steps written out with an nn.Linear after the dictionary."""
    settings = config(pair, scope, corrector="affine", weight_decay=0.0, clip_norm=None, lr=1e-3)
    folder = fit(settings, tmp_path / "run")
    plan, model, (dictionary,), _ = opened(settings)
    fitted = load_corrector(model, folder, [dictionary])
    linear = torch.nn.Linear(D, D)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(D))
        linear.bias.zero_()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=0.0)
    layer = model.model.layers[1]
    for batch in plan.batches(4, torch.device("cpu")):
        ids, mask = batch.ids, batch.attention_mask
        with torch.no_grad():
            p = model(input_ids=ids, attention_mask=mask).logits.softmax(-1)
        kept = (torch.isin(ids, torch.tensor([0, 1, 2])) | (mask == 0))[..., None]
        handle = layer.register_forward_hook(
            lambda _m, _a, x, kept=kept: torch.where(kept, x, linear(dictionary(x.flatten(0, 1))).view_as(x))
        )
        log_q = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        handle.remove()
        loss = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)[mask.bool()].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (affine,) = fitted.dictionaries
    torch.testing.assert_close(torch.eye(D) + affine.W, linear.weight.T, rtol=1e-3, atol=2e-4)  # type: ignore[operator]
    torch.testing.assert_close(affine.shift, linear.bias, rtol=1e-3, atol=2e-4)
    assert float(linear.bias.detach().abs().max()) > 2e-3


def test_the_fine_tuned_sae_keeps_thresholds_and_the_file_keeps_the_sae(pair: Any, scope: Path, tmp_path: Path) -> None:
    before = (scope / "params.npz").read_bytes()
    settings = config(pair, scope, corrector="sae")
    folder = fit(settings, tmp_path / "run")
    plan, model, dictionaries, (batch, *_) = opened(settings)
    fitted = load_corrector(model, folder, dictionaries)
    found, was = fitted.dictionaries[0].state_dict(), dictionaries[0].state_dict()
    assert torch.equal(found["threshold"], was["threshold"])
    assert all(not torch.equal(found[name], was[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    assert (scope / "params.npz").read_bytes() == before
    with torch.no_grad():
        after, plain = (objective.batch_kl(model, d, batch, plan.keep_ids) for d in (fitted.dictionaries, dictionaries))
    assert 0 < float(after) < float(plain)


@pytest.mark.parametrize("changes", [{"architecture": "jumprelu"}, {"architecture": "standard"}, {"crosscoder": 1}])
def test_saes_of_other_layouts_are_fine_tuned_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    w = {name: torch.from_numpy(value).contiguous() for name, value in arrays().items()}
    folder = tmp_path / "sae"
    if "crosscoder" in changes:
        made = Crosscoder(CrosscoderConfig(dict_size=F, k=4, d_model=D, n_models=1))
        made.init_weights_(norm=0.3, generator=torch.Generator().manual_seed(0))
        made.save(folder)
    else:
        folder.mkdir()
        if changes["architecture"] == "standard":
            del w["threshold"]
        save_file(w, folder / "sae_weights.safetensors")
        described = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
        (folder / "cfg.json").write_text(json.dumps({**described, **changes, "normalize_activations": "none"}))
    dictionary = load_dictionary(folder, hook_point=POINT)
    copied = trainable_copy(dictionary)
    assert torch.equal(copied(X), dictionary(X))
    copied(X).pow(2).sum().backward()
    moved = {n.split(".")[-1] for n, w in copied.named_parameters() if w.grad is not None and float(w.grad.norm()) > 0}
    assert {"W_enc", "W_dec", "b_enc", "b_dec"} <= moved and "threshold" not in moved


# ------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("corrector", "control"),
    [("mean-scale", "none"), ("affine", "noise"), ("sae", "random-decoder"), ("lora", "shuffled-decoder")],
)
def test_fit_and_load_give_what_was_trained(
    pair: Any, scope: Path, tmp_path: Path, corrector: str, control: str
) -> None:
    settings = config(pair, scope, corrector=corrector, control=control, rank=64)
    folder = fit(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < lines[0]["kl"]
    sidecar = read_sidecar(folder)
    (entry,) = sidecar["dictionaries"]
    source = load_dictionary(scope)
    assert sidecar["corrector"] == corrector and sidecar["tokens"]["n"] >= 400
    if control == "none":
        assert entry["control"] is None and entry["hash"] == source.content_hash()
    else:
        assert entry["control"] == {"kind": control, "seed": 0, "source_hash": source.content_hash()}
    plan, model, dictionaries, (batch, *_) = opened(settings)
    fitted = load_corrector(model, folder, dictionaries)
    with torch.no_grad():
        after = objective.batch_kl(fitted.model, fitted.dictionaries, batch, plan.keep_ids)
        with objective.lora_off(fitted.model), splice(fitted.model, dictionaries, keep_ids=plan.keep_ids):
            q = resume.logits(fitted.model, batch)[batch.attention_mask.bool()]
        with objective.lora_off(fitted.model):
            p = resume.logits(fitted.model, batch)[batch.attention_mask.bool()]
    assert 0 < float(after) < float(predictions.kl(predictions.log_probs(p), predictions.log_probs(q)).sum())
    assert fit(settings, tmp_path / "run") == folder  # complete already


def test_folders_refuse_other_dictionaries_controls_and_seeds(pair: Any, scope: Path, tmp_path: Path) -> None:
    settings = config(pair, scope, corrector="mean-scale", control="shuffled-decoder", n_tokens=100)
    folder = fit(settings, tmp_path / "run")
    source, model = load_dictionary(scope), torch.nn.Linear(1, 1)
    for wrong in ([source], with_control([source], "shuffled-decoder", 1), with_control([source], "noise", 0)):
        with pytest.raises(InputError, match="was fitted around"):
            load_corrector(model, folder, wrong)
    load_corrector(model, folder, with_control([source], "shuffled-decoder", 0))
    with pytest.raises(InputError, match="no LoRA"):
        load_adapter(model, folder, [source])


def test_settings_without_effect_are_refused(
    pair: Any, scope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = ["fit", "--model", pair.tuned, "--data", pair.data, "--dictionary", str(scope), "--out", str(tmp_path / "o")]
    for flags, said in (
        (["--corrector", "affine", "--rank", "8"], "has no LoRA"),
        (["--corrector", "mean-scale", "--layers", "all"], "has no LoRA"),
        (["--corrector", "sae", "--control", "noise"], "keeps nothing"),
        (["--control", "random"], "control"),
    ):
        assert main([*fits, *flags]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("corrector", "control"), [("affine", "noise"), ("sae", "none")])
def test_an_interrupted_fit_of_a_corrector_goes_on_with_the_same_bits(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrector: str, control: str
) -> None:
    settings = config(pair, scope, corrector=corrector, control=control)
    whole = (fit(settings, tmp_path / "whole") / "corrector.safetensors").read_bytes()
    real, calls = loop.take_step, []

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(StopRequested, match="step 3"):
        fit(settings, tmp_path / "cut")
    assert (fit(settings, tmp_path / "cut") / "corrector.safetensors").read_bytes() == whole
