"""Dictionaries: each layout computes what its publisher's code computes, and wrong files are refused by one line."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dictionaries import POINT, D, F, X, arrays, gemma_scope, sae_lens
from safetensors.torch import load_file, save_file

from crosscoders import CorruptData, Crosscoder, CrosscoderConfig, InputError
from sae_lora import inspect_dictionary, load_dictionary
from sae_lora.dictionaries import gemma_scope as gemma_scope_files
from sae_lora.dictionaries.frozen import require_fit


def crosscoder(folder: Path, n_models: int) -> Crosscoder:
    made = Crosscoder(CrosscoderConfig(dict_size=F, activation="relu", d_model=D, n_models=n_models))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    cache = {"hook_point": POINT, "base": {"name": "b", "hash": "1"}, "tuned": {"name": "t", "hash": "2"}}
    made.requires_grad_(False).save(folder, provenance={"cache": cache})
    return made


def test_a_gemma_scope_folder_gives_the_published_jumprelu_and_its_hook_point(tmp_path: Path) -> None:
    found = load_dictionary(gemma_scope(tmp_path), d_model=D)
    w = arrays()
    pre = X.numpy() @ w["W_enc"] + w["b_enc"]
    latents = np.where((pre > w["threshold"]) & (pre > 0), pre, 0)
    assert 0 < (latents > 0).mean() < 1
    np.testing.assert_allclose(found.encode(X).numpy(), latents, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found(X).numpy(), latents @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-5)
    assert found.hook_point == POINT and found.dtype == torch.float32
    assert not any(weight.requires_grad for weight in found.state_dict(keep_vars=True).values())


def test_gemma_scope_equals_sae_lens_on_the_same_weights(tmp_path: Path) -> None:
    other = load_dictionary(sae_lens(tmp_path / "sae"))
    w = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    ours = load_dictionary(gemma_scope(tmp_path, {name: value.numpy() for name, value in w.items()}))
    distance = X @ w["W_enc"] + w["b_enc"] - w["threshold"]
    assert float(distance.abs().min()) > 1e-4  # no pre-activation so near its threshold that rounding decides
    assert torch.equal(ours.encode(X) > 0, other.encode(X) > 0)
    torch.testing.assert_close(ours.encode(X), other.encode(X))  # the bias is added inside or after the product
    torch.testing.assert_close(ours(X), other(X))
    assert ours.content_hash() != other.content_hash()  # another layout is another program


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "standard"},
        {"architecture": "topk", "k": 3},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
    ],
)
def test_a_sae_lens_folder_computes_what_sae_lens_computes(tmp_path: Path, changes: dict[str, object]) -> None:
    from sae_lens import SAE

    folder = sae_lens(tmp_path / "sae", **changes)
    if changes.get("architecture"):
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors.pop("threshold")
        save_file(tensors, folder / "sae_weights.safetensors")
    torch.testing.assert_close(load_dictionary(folder)(X), SAE.load_from_disk(folder)(X))


def test_the_hook_name_survives_metadata_without_a_version(tmp_path: Path) -> None:
    from sae_lens import SAE

    folder = sae_lens(tmp_path / "sae", metadata={"hook_name": POINT, "model_name": "tiny"})
    assert SAE.load_from_disk(folder).cfg.metadata.hook_name is None  # the trap: nothing would be spliced
    assert load_dictionary(folder).hook_point == POINT
    old = sae_lens(tmp_path / "old", metadata=None, hook_name=POINT)
    assert load_dictionary(old).hook_point == POINT


def test_sides_of_a_crosscoder_share_latents_and_both_is_their_mean(tmp_path: Path) -> None:
    made = crosscoder(tmp_path / "cc", 2)
    base, tuned, both = (load_dictionary(tmp_path / "cc", side=side) for side in ("base", "tuned", "both"))
    x_hat = made(torch.stack([X, X], dim=1))
    torch.testing.assert_close(torch.stack([base(X), tuned(X)], dim=1), x_hat)
    torch.testing.assert_close(both(X), (base(X) + tuned(X)) / 2)
    assert len({d.content_hash() for d in (base, tuned, both)}) == 3 and both.hook_point == POINT
    single = crosscoder(tmp_path / "one", 1)
    torch.testing.assert_close(load_dictionary(tmp_path / "one")(X), single(X[:, None])[:, 0])


def test_the_hash_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first = load_dictionary(gemma_scope(tmp_path / "a"))
    assert first.content_hash() == load_dictionary(gemma_scope(tmp_path / "b", layer=2)).content_hash()
    changed = arrays()
    changed["threshold"][0] += 1e-3
    assert first.content_hash() != load_dictionary(gemma_scope(tmp_path / "c", changed)).content_hash()


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations 'expected_average_only_in'"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"metadata": {"sae_lens_version": "6.54.0"}}, "does not say its hook point"),
        ({"d_in": D + 1}, "'W_enc' has shape"),
        ({"d_in": F, "d_sae": D}, "transposed"),
        ({"d_sae": "many"}, "expected whole numbers"),
    ],
)
def test_sae_lens_folders_that_cannot_be_spliced_are_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        inspect_dictionary(sae_lens(tmp_path / "sae", **changes))


def test_wrong_gemma_scope_arrays_are_refused(tmp_path: Path) -> None:
    good = arrays()
    with pytest.raises(InputError, match="transposed"):
        inspect_dictionary(gemma_scope(tmp_path / "a", good | {"W_enc": good["W_enc"].T, "W_dec": good["W_dec"].T}))
    with pytest.raises(InputError, match="no array 'threshold'"):
        inspect_dictionary(gemma_scope(tmp_path / "b", {k: v for k, v in good.items() if k != "threshold"}))
    with pytest.raises(InputError, match="d_model 6 but the model has 7"):
        load_dictionary(gemma_scope(tmp_path / "c"), d_model=7)
    with pytest.raises(InputError, match="belongs to hook_point"):
        load_dictionary(
            tmp_path / "c" / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71", hook_point="blocks.0.x"
        )
    with pytest.raises(CorruptData, match="not finite"):
        load_dictionary(gemma_scope(tmp_path / "d", good | {"b_dec": np.full(D, np.nan, np.float32)}))
    with pytest.raises(InputError, match="not floating-point"):
        inspect_dictionary(gemma_scope(tmp_path / "e", good | {"b_dec": np.array([{}] * D)}))  # would need a pickle


@pytest.mark.parametrize("start", ["", "models--google--"])
def test_releases_for_the_mlp_and_for_attention_sit_at_their_own_hook_points(tmp_path: Path, start: str) -> None:
    for release, site in (
        ("2b-pt-mlp", "hook_mlp_out"),
        ("9b-it-att", "attn.hook_z"),
        ("2b-pt-res", "hook_resid_post"),
    ):
        folder = tmp_path / f"{start}gemma-scope-{release}" / "snapshots" / "c0" / "layer_1" / "width_16k" / "x"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays())
        assert inspect_dictionary(folder).hook_point == f"blocks.1.{site}"
    folder = tmp_path / f"{start}gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "x"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays())
    with pytest.raises(InputError, match="is a transcoder"):
        inspect_dictionary(folder)


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_bombs_are_refused_from_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_scope_files, "read_arrays", None)  # nothing may be inflated
    wide = {"W_enc": (64, 40_000), "W_dec": (40_000, 64), "b_enc": (40_000,), "b_dec": (64,), "threshold": (40_000,)}
    zeros, liar = tmp_path / "zeros.npz", tmp_path / "liar.npz"
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in wide.items():
            archive.writestr(f"{name}.npy", header(shape) + bytes(4 * int(np.prod(shape))))
    with pytest.raises(CorruptData, match="would inflate from"):
        load_dictionary(zeros, hook_point=POINT)
    with zipfile.ZipFile(liar, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in wide.items():
            archive.writestr(f"{name}.npy", header(shape) + bytes(16))
    with pytest.raises(CorruptData, match="declares 10,240,128 bytes but 144 are stored"):
        load_dictionary(liar, hook_point=POINT)


def test_damaged_archives_and_lost_paths_are_named(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path)
    data = bytearray((folder / "params.npz").read_bytes())
    (folder / "params.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptData, match=r"no \.npz archive"):
        load_dictionary(folder)
    data[200] ^= 255
    (folder / "params.npz").write_bytes(data)
    with pytest.raises(CorruptData, match="damaged"):
        load_dictionary(folder)
    with pytest.raises(InputError, match="there is no dictionary"):
        load_dictionary(tmp_path / "nothing")


def test_sides_are_asked_for_where_they_mean_something(tmp_path: Path) -> None:
    crosscoder(tmp_path / "cc", 2)
    crosscoder(tmp_path / "one", 1)
    with pytest.raises(InputError, match="Give its side"):
        inspect_dictionary(tmp_path / "cc")
    with pytest.raises(InputError, match="has no effect"):
        inspect_dictionary(tmp_path / "one", side="base")
    with pytest.raises(InputError, match="is an SAE"):
        inspect_dictionary(gemma_scope(tmp_path), side="base")


def test_a_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    crosscoder(tmp_path / "cc", 2)
    info = inspect_dictionary(tmp_path / "cc", side="tuned")
    require_fit(info, d_model=D, n_layers=3, model_name="m", model_hash="2")
    for change, said in (
        ({"d_model": D + 1}, "d_model 6 but model 'm' has 7"),
        ({"n_layers": 1}, "it has layers 0 to 0"),
        ({"model_hash": "3"}, "was trained on b and t, not on 'm'"),
    ):
        settings: dict[str, object] = {"d_model": D, "n_layers": 3, "model_name": "m", "model_hash": "2"}
        with pytest.raises(InputError, match=said):
            require_fit(info, **(settings | change))  # type: ignore[arg-type]
