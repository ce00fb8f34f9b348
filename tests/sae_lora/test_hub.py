"""Published dictionaries by name: SAELens's list, any repository of the hub, and one line where none can be had.

The hub is a local folder in the layout of the published repositories.
"""

import json
from pathlib import Path

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from dictionaries import POINT, D, F, X, arrays, sae_lens
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import save_file

from crosscoders import InputError
from sae_lora import inspect_dictionary, load_dictionary


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories as folders OWNER/NAME; what is not there is not found."""
    import sae_lens.loading.pretrained_sae_loaders as loaders

    root = tmp_path / "hub"

    def download(repo_id: str, filename: str, subfolder: str | None = None, force_download: bool = False) -> str:
        cached = root / f"models--{repo_id.replace('/', '--')}" / "snapshots" / "c0"
        path = cached / (subfolder or "") / filename
        if not cached.is_dir():
            raise LocalEntryNotFoundError("Cannot reach the hub and nothing is cached.")
        if not path.is_file():
            answer = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
            raise RemoteEntryNotFoundError(f"404: no {filename} in {repo_id}.", response=answer)
        return str(path)

    for module in (huggingface_hub, loaders):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return root


def repository(hub: Path, name: str, folder: str) -> Path:
    made = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "c0" / folder
    made.mkdir(parents=True)
    return made


def test_gemma_scope_loads_by_release_and_id_and_by_its_alias(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_102")
    np.savez(folder / "params.npz", **arrays())
    wanted = load_dictionary(folder)
    for name in (
        "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_102",
        "gemma-scope-2b-pt-res-canonical/layer_1/width_16k/canonical",
        "google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_102",
    ):
        found = load_dictionary(name, d_model=D)
        assert torch.equal(found(X), wanted(X)) and found.content_hash() == wanted.content_hash()
        assert found.hook_point == POINT and found.info.path == name  # what a sidecar records, good on other machines


def test_gemma_scope_2_loads_by_release_and_by_repository_without_its_settings_too(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "google/gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_big")
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file({names.get(k, k): torch.from_numpy(v) for k, v in arrays().items()}, folder / "params.safetensors")
    for name in (
        "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_big",
        "google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_big",
    ):
        found = load_dictionary(name, d_model=D)
        assert found.hook_point == "blocks.12.hook_resid_post" and found.info.path == name
        w = arrays()
        pre = X.numpy() @ w["W_enc"] + w["b_enc"]
        latents = np.where(pre > w["threshold"], pre, 0)
        np.testing.assert_allclose(found(X).numpy(), latents @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-5)


def test_sae_lens_releases_keep_their_hook_name_without_a_version(hub: Path, tmp_path: Path) -> None:
    from sae_lens import SAE

    # The release gpt2-small-attn-out-v5-32k has the id blocks.0.hook_attn_out in the folder v5_32k_layer_0.
    parent = repository(hub, "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs", "")
    point = "blocks.0.hook_attn_out"
    sae_lens(parent / "v5_32k_layer_0", metadata={"hook_name": point, "model_name": "gpt2-small"})
    name = f"gpt2-small-attn-out-v5-32k/{point}"
    assert SAE.from_pretrained(*name.split("/")).cfg.metadata.hook_name is None  # the trap: nothing would be spliced
    found = load_dictionary(name)
    assert found.hook_point == point
    torch.testing.assert_close(found(X), SAE.from_pretrained(*name.split("/"))(X))
    direct = load_dictionary("jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs/v5_32k_layer_0")
    assert direct.content_hash() == found.content_hash()


def test_llama_scope_is_read_with_its_activation_scale(hub: Path) -> None:
    w, norm = arrays(), 58.935251798561154  # the factor of l0r_8x in SAELens's list is sqrt(d_model) / mean norm
    folder = repository(hub, "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L0R-8x")
    (folder / "checkpoints").mkdir()
    tensors = {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }  # fmt: skip
    save_file({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    hyper = {
        "d_model": D, "d_sae": F, "jump_relu_threshold": 0.3 / norm, "hook_point_in": "blocks.0.hook_resid_post",
        "dataset_average_activation_norm": {"in": D**0.5 / norm},
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(hyper))
    info = inspect_dictionary("llama_scope_lxr_8x/l0r_8x")
    assert (info.hook_point, info.d_model, info.dict_size) == ("blocks.0.hook_resid_post", D, F)
    found = load_dictionary("llama_scope_lxr_8x/l0r_8x")
    x = X / norm
    pre = norm * x.numpy() @ w["W_enc"] + w["b_enc"]
    latents = np.where(pre > 0.3, pre, 0)  # SAELens scales the threshold too
    assert (latents > 0).sum() > 0
    np.testing.assert_allclose(found(x).numpy(), (latents @ w["W_dec"] + w["b_dec"]) / norm, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_had_is_one_line_with_the_mend(hub: Path, tmp_path: Path) -> None:
    parent = repository(hub, "someone/saes", "")
    sae_lens(
        parent / "centred", metadata={"hook_name": POINT, "model_from_pretrained_kwargs": {"center_unembed": True}}
    )
    for name, said in (
        ("gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_102", r"Cannot reach the hub .* give the path\.$"),
        ("gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_1", "has no id .*did you mean 'layer_1/width_16k/average"),
        ("gemma-scope-2b-pt-rse/layer_1/width_16k/average_l0_102", "Cannot reach the hub"),
        ("gemma-scope-2b-pt-rse/x", "did you mean 'gemma-scope-2b-pt-res'"),
        ("llama_scope_lxr_8x/l0r_8x", "Cannot reach the hub"),
        ("someone/saes/none", r"'none' of the hub's repository 'someone/saes' holds none of sae_weights.safetensors"),
        ("someone/saes/centred", r"TransformerLens changed \(center_unembed\)"),
        (str(tmp_path / "none"), "there is no dictionary"),
        ("none.npz", "there is no dictionary"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            inspect_dictionary(name)
        assert "\n" not in str(caught.value)


def test_qwen_scope_and_dictionary_learning_load_by_name(hub: Path) -> None:
    w = {name: torch.from_numpy(value) for name, value in arrays().items()}
    turned = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    folder = repository(hub, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "")
    torch.save({name: value.contiguous() for name, value in turned.items()}, folder / "layer0.sae.pt")
    for name in ("qwen-scope-3-1.7b-base-w32k-l50/layer0", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt"):
        info = inspect_dictionary(name)
        assert (info.hook_point, info.settings["k"], info.d_model) == ("blocks.0.hook_resid_post", 50, D)
    path = "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12/trainer_0"
    folder = repository(hub, "canrager/saebench_gemma-2-2b_width-2pow12_date-1109", path)
    torch.save({**w, "k": torch.tensor(3)}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 3, "submodule_name": "resid_post_layer_12"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = load_dictionary("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0")
    assert ((found.encode(X) > 0).sum(dim=1) <= 3).all() and found.hook_point == "blocks.12.hook_resid_post"


def test_a_crosscoder_over_layers_loads_by_its_folder_in_the_repository(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "crosscoder/layer_5_9_width_65k_l0_medium"
    folder = repository(hub, "google/gemma-scope-2-270m-pt", place)
    for number in range(2):
        tensors = {"b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
        save_file(tensors, folder / f"params_layer_{number}.safetensors")

    def snapshot(repo_id: str, allow_patterns: str) -> str:
        assert allow_patterns == f"{place}/*"
        return str(hub / f"models--{repo_id.replace('/', '--')}" / "snapshots" / "c0")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    info = inspect_dictionary(f"google/gemma-scope-2-270m-pt/{place}", hook_point="blocks.9.hook_resid_post")
    assert (info.d_model, info.dict_size, info.hook_point) == (D, 2 * F, "blocks.9.hook_resid_post")
