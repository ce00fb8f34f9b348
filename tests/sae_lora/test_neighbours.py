"""Dictionaries as their publishers left them: old SAELens folders, names of transformers, folders of other toolkits."""

import json
from pathlib import Path

import pytest
import torch
from dictionaries import POINT, D, F, X, arrays, gemma_scope, sae_lens
from safetensors.torch import load_file, save_file

from crosscoders import InputError, load_crosscoder
from crosscoders.models import points
from sae_lora import inspect_dictionary, load_dictionary


def old_sae_lens(folder: Path, **changes: object) -> Path:
    """A standard SAE in a folder from before SAELens wrote an architecture: flat settings, few of them."""
    unsaid = dict.fromkeys(
        ("architecture", "metadata", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")
    )
    sae_lens(folder, **{**unsaid, "hook_name": POINT, "activation_fn_str": "relu", **changes})
    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_a_folder_without_an_architecture_is_the_standard_sae(tmp_path: Path) -> None:
    w = {name: torch.from_numpy(value) for name, value in arrays(1).items()}
    found = load_dictionary(old_sae_lens(tmp_path / "sae"))
    latents = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])  # at that time the decoder bias was subtracted
    torch.testing.assert_close(found.encode(X), latents)
    torch.testing.assert_close(found(X), latents @ w["W_dec"] + w["b_dec"])
    assert found.hook_point == POINT and found.info.settings["architecture"] == "standard"


def test_a_folder_without_an_architecture_may_name_topk_and_an_older_hook_point(tmp_path: Path) -> None:
    folder = old_sae_lens(
        tmp_path / "sae", activation_fn_str="topk", activation_fn_kwargs={"k": 2}, hook_name=None, hook_point=POINT
    )
    found = load_dictionary(folder)
    assert found.info.settings["architecture"] == "topk" and found.hook_point == POINT
    assert ((found.encode(X) > 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("value", [None, False])
def test_no_normalisation_may_be_written_as_null_or_false(tmp_path: Path, value: object) -> None:
    folder = old_sae_lens(tmp_path / "sae")
    plain = load_dictionary(folder)(X)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": value}))
    assert torch.equal(load_dictionary(folder)(X), plain)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"normalize_activations": True}, "normalize_activations 'expected_average_only_in'"),
        ({"hook_name": "blocks.1.attn.hook_z"}, "attention heads"),  # SAELens reshapes these unless told otherwise
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu', which SAELens reads as relu"),
        ({"hook_name": None}, "does not say its hook point"),
    ],
)
def test_what_an_old_folder_leaves_unsaid_is_taken_as_sae_lens_takes_it(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        inspect_dictionary(old_sae_lens(tmp_path / "sae", **changes))


# ----------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    "name, model_type, expected",
    [
        ("model.layers.8", None, "blocks.8.hook_resid_post"),
        ("gpt_neox.layers.3", None, "blocks.3.hook_resid_post"),
        ("transformer.h.3", None, "blocks.3.hook_resid_post"),
        ("layers.11", None, "blocks.11.hook_resid_post"),
        ("model.language_model.layers.2.output", "gemma3_text", "blocks.2.hook_resid_post"),
        ("model.layers.2.input", "llama", "blocks.2.hook_resid_pre"),
        ("model.layers.8.mlp", "llama", "blocks.8.hook_mlp_out"),
        ("model.layers.8.self_attn", "qwen3", "blocks.8.hook_attn_out"),
        ("model.layers.8.self_attn.o_proj.input", "gemma2", "blocks.8.attn.hook_z"),
        ("model.layers.8.post_feedforward_layernorm.output", "gemma2", "blocks.8.hook_mlp_out"),
        ("model.layers.8.pre_feedforward_layernorm.output", "gemma3_text", "blocks.8.mlp.hook_in"),
        ("model.layers.8.mlp.input", "llama", "blocks.8.mlp.hook_in"),
        ("transformer.h.0.mlp", "gpt2", "blocks.0.hook_mlp_out"),
        ("blocks.8.hook_resid_post", None, "blocks.8.hook_resid_post"),
        ("blocks.8.attn.hook_z", None, "blocks.8.attn.hook_z"),
        ("model.layers.8.mlp", "gemma2", None),  # a norm stands between this module and the residual stream
        ("model.layers.8.mlp", None, None),
        ("model.layers.8.self_attn.o_proj", "llama", None),
        ("vision_tower.encoder.layers.2", None, None),
        ("model.embed_tokens", None, None),
    ],
)
def test_names_of_modules_are_hook_points_where_both_mean_the_same(
    name: str, model_type: str | None, expected: str | None
) -> None:
    assert points.known_as(name, model_type) == expected


def placed(folder: Path, name: str) -> Path:
    return sae_lens(folder, metadata={"sae_lens_version": "6.54.0", "hook_name": name})


def test_a_dictionary_at_a_module_of_transformers_is_placed(tmp_path: Path) -> None:
    layer, mlp = placed(tmp_path / "layer", "model.layers.1"), placed(tmp_path / "mlp", "model.layers.1.mlp")
    assert load_dictionary(layer).hook_point == POINT
    for given in (POINT, "model.layers.1"):
        assert inspect_dictionary(layer, hook_point=given).hook_point == POINT
    with pytest.raises(InputError, match=r"belongs to hook_point 'blocks.1.hook_resid_post', not 'blocks.2"):
        inspect_dictionary(layer, hook_point="blocks.2.hook_resid_post")
    assert inspect_dictionary(mlp, model_type="llama").hook_point == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.embed_tokens", "residual stream of layer 1"])
def test_a_place_that_cannot_be_run_is_asked_for_and_may_be_replaced(tmp_path: Path, name: str) -> None:
    folder = placed(tmp_path / "sae", name)
    with pytest.raises(InputError, match=f"sits at '{name}', which cannot be run. Give it: --hook-point"):
        inspect_dictionary(folder, model_type="gemma2")
    assert load_dictionary(folder, hook_point=POINT).hook_point == POINT


def test_a_gemma_scope_path_without_its_release_does_not_tell_the_place(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path)
    folder = folder.rename(tmp_path / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "copy")
    (tmp_path / "gemma-scope-2b-pt-res").rename(tmp_path / "downloads")
    folder = tmp_path / "downloads" / "layer_1" / "width_16k" / "copy"
    with pytest.raises(InputError, match="does not say its hook point"):
        inspect_dictionary(folder)
    assert inspect_dictionary(folder, hook_point="blocks.1.hook_mlp_out").hook_point == "blocks.1.hook_mlp_out"
    with pytest.raises(InputError, match=r"is of layer 1, not at 'blocks.2.hook_resid_post'"):
        inspect_dictionary(folder, hook_point="blocks.2.hook_resid_post")


# ------------------------------------------------------------------------------------------------ other toolkits


def folder_with(folder: Path, names: list[str], **config: object) -> Path:
    """A folder with these files of one small tensor each, and cfg.json or config.json where named."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"W_dec": torch.zeros(F, D)}, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(config))
        else:
            torch.save({"encoder.weight": torch.zeros(F, D), "bias": torch.zeros(D)}, path)
    return folder


NEIGHBOURS = [
    (
        ["config.json", "layers.3/cfg.json", "layers.3/sae.safetensors"],
        {},
        "a folder of dictionaries of sparsify, such",
    ),
    (["config.json", "ae.pt"], {"trainer": {"dict_class": "Transcoder"}}, "is a transcoder of dictionary_learning"),
    (["trainer_0/config.json", "trainer_0/ae.pt"], {}, "of dictionary_learning, such as 'trainer_0'"),
    (["config.yaml", "layer_0.safetensors", "layer_1.safetensors"], {}, "is a set of transcoders of circuit-tracer"),
    (["model.pt", "model_cfg.yaml"], {}, "is a crosscoder of crosscode"),
    (["sae_weights.safetensors"], {}, "is an SAE of SAELens without its cfg.json"),
]


@pytest.mark.parametrize("names, config, said", NEIGHBOURS)
def test_folders_of_other_toolkits_are_refused_for_what_they_are(
    tmp_path: Path, names: list[str], config: dict[str, object], said: str
) -> None:
    folder = folder_with(tmp_path / "it", names, **config)
    for read in (lambda: inspect_dictionary(folder, hook_point=POINT), lambda: load_crosscoder(folder)):
        with pytest.raises(InputError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value) and "read" in str(caught.value)
    with pytest.raises(InputError, match=r"What is read: params.npz of Gemma Scope, "):
        inspect_dictionary(folder, hook_point=POINT)


def test_saes_that_we_read_are_named_where_a_crosscoder_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an SAE of SAELens. Crosscoders"):
        load_crosscoder(sae_lens(tmp_path / "sae"))
    with pytest.raises(InputError, match=r"is an SAE of Gemma Scope. Crosscoders"):
        load_crosscoder(gemma_scope(tmp_path))
    for transcode, said in ((False, "is an SAE of sparsify"), (True, "is a transcoder of sparsify")):
        files = ["cfg.json", "sae.safetensors"]
        with pytest.raises(InputError, match=said):
            load_crosscoder(folder_with(tmp_path / said, files, transcode=transcode))
    qwen = folder_with(tmp_path / "qwen", ["layer3.sae.pt"])
    for path in (qwen, qwen / "layer3.sae.pt"):
        with pytest.raises(InputError, match="is an SAE of Qwen Scope"):
            load_crosscoder(path)
    second = folder_with(tmp_path / "second", ["config.json", "params.safetensors"], hf_hook_point_out="x")
    with pytest.raises(InputError, match=r"is a transcoder of Gemma Scope 2. Crosscoders .*load_dictionary reads SAEs"):
        load_crosscoder(second)


def test_dictionaries_whose_tensors_alone_tell_are_refused_by_their_axes(tmp_path: Path) -> None:
    sae = folder_with(tmp_path / "sae", ["config.json", "ae.pt"])
    with pytest.raises(InputError, match="an encoder with 2 axes, where a crosscoder has 3, is an SAE's"):
        inspect_dictionary(sae, hook_point=POINT)
    flat = folder_with(tmp_path / "flat", ["cfg.json"])
    zeros = {"W_enc": torch.zeros(D, F), "W_dec": torch.zeros(F, D), "b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    torch.save(zeros, flat / "cc_weights.pt")
    with pytest.raises(InputError, match="its W_enc has 2 axes"):
        load_crosscoder(flat)
    (flat / "cc_weights.pt").unlink()
    with pytest.raises(InputError, match=r"has a cfg.json but no weights that are read"):
        load_crosscoder(flat)
