"""Dictionaries in the layouts of their publishers: tiny files written by hand, latents and outputs computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crosscoders import CrosscoderConfig, InputError, TrainConfig, load_crosscoder
from crosscoders.formats.gemma_scope_2 import read_layers
from sae_lora import inspect_dictionary, load_dictionary
from sae_lora.dictionaries import sae_lens
from sae_lora.dictionaries.controls import with_random_decoder
from sae_lora.splicing import splice

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
ENCODER = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])  # (d_model 2, dict_size 3)
DECODER = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # (dict_size 3, d_model 2)
B_ENC, B_DEC = torch.tensor([0.5, -0.5, 0.0]), torch.tensor([10.0, 20.0])
# X ENCODER + B_ENC = [[1.5, 1.5, -1], [3.5, -1.5, 4]]


def written(folder: Path, tensors: dict[str, Tensor], weights: str, config: dict[str, Any] | None, name: str) -> Path:
    """A folder with one file of weights and, unless there is none, one of settings."""
    folder.mkdir(parents=True)
    if weights.endswith(".safetensors"):
        save_file(tensors, folder / weights)
    else:
        torch.save(tensors, folder / weights)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return folder


# -------------------------------------------------------------------------------------------------- Gemma Scope 2

GEMMA = {"w_enc": ENCODER, "w_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": torch.tensor([2.0, 1.0, 4.0])}
SETTINGS = {
    "hf_hook_point_in": "model.layers.12.output", "width": 3, "model_name": "gemma-3-270m-pt", "l0": 20,
    "architecture": "jump_relu", "affine_connection": False, "type": "sae",
}  # fmt: skip
MLP = {
    **SETTINGS, "type": "transcoder", "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output", "affine_connection": True,
}  # fmt: skip
SKIP = torch.tensor([[0.0, 100.0], [1000.0, 0.0]])  # (d_in, d_out), used as x @ W


def gemma_2(folder: Path, config: dict[str, Any] | None = SETTINGS, **changes: Tensor) -> Path:
    return written(folder, {**GEMMA, **changes}, "params.safetensors", config, "config.json")


def test_an_sae_of_gemma_scope_2_gates_every_latent_at_its_own_threshold(tmp_path: Path) -> None:
    found = load_dictionary(gemma_2(tmp_path / "sae"))
    latents = torch.tensor([[0.0, 1.5, 0.0], [3.5, 0.0, 0.0]])  # 4 is not above 4
    assert torch.equal(found.encode(X), latents)
    assert torch.equal(found(X), torch.tensor([[10.0, 23.0], [13.5, 20.0]]))
    assert found.hook_point == "blocks.12.hook_resid_post" and found.info.writes is None
    by_file = load_dictionary(tmp_path / "sae" / "params.safetensors")
    assert by_file.content_hash() == found.content_hash()


def test_a_transcoder_of_gemma_scope_2_adds_its_affine_skip(tmp_path: Path) -> None:
    found = load_dictionary(gemma_2(tmp_path / "it", MLP, affine_skip_connection=SKIP))
    assert torch.equal(found.encode(X), torch.tensor([[0.0, 1.5, 0.0], [3.5, 0.0, 0.0]]))
    # x W_skip = [[2000, 100], [-1000, 300]]
    assert torch.equal(found(X), torch.tensor([[2010.0, 123.0], [-986.5, 320.0]]))
    assert (found.hook_point, found.info.writes) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    with pytest.raises(InputError, match=r"it reads 'blocks.3.mlp.hook_in' and computes 'blocks.3.hook_mlp_out', so"):
        splice(torch.nn.Linear(2, 2), found).__enter__()


@pytest.mark.parametrize(
    "where, hook_point",
    [
        ("resid_post_all/layer_7_width_16k_l0_small", "blocks.7.hook_resid_post"),
        ("attn_out/layer_12_width_16k_l0_medium", "blocks.12.attn.hook_z"),
        ("mlp_out/layer_5_width_16k_l0_big", "blocks.5.hook_mlp_out"),
        ("transcoder/layer_5_width_16k_l0_big", "blocks.5.mlp.hook_in"),
    ],
)
def test_a_folder_of_gemma_scope_2_without_settings_tells_its_place_by_its_path(
    tmp_path: Path, where: str, hook_point: str
) -> None:
    info = inspect_dictionary(gemma_2(tmp_path / where, None))
    assert info.hook_point == hook_point and (info.writes is not None) == where.startswith("transcoder")


def test_a_wrong_guess_about_gemma_scope_2_is_refused(tmp_path: Path) -> None:
    layers = {**SETTINGS, "type": "clt"}
    with pytest.raises(InputError, match="is a clt of Gemma Scope 2; its SAEs and transcoders are read here"):
        inspect_dictionary(gemma_2(tmp_path / "clt", layers))
    with pytest.raises(InputError, match=r"'w_enc' has shape \(3, 2\), expected \(2, 3\) .* It is transposed"):
        inspect_dictionary(gemma_2(tmp_path / "turned", w_enc=ENCODER.T.contiguous()))
    with pytest.raises(InputError, match="'affine_skip_connection' has shape None"):
        inspect_dictionary(gemma_2(tmp_path / "torn", MLP))
    with pytest.raises(InputError, match=r"belongs to hook_point 'blocks.12.hook_resid_post', not 'blocks.3"):
        inspect_dictionary(gemma_2(tmp_path / "sae"), hook_point="blocks.3.hook_resid_post")
    with pytest.raises(InputError, match="does not say its hook point"):
        inspect_dictionary(gemma_2(tmp_path / "unplaced", None))


# --------------------------------------------------------------------------------------------- dictionary_learning

# (X - B_DEC) ENCODER + B_ENC with the bias below: X - (1, 1) = [[0, 1], [2, -2]]
SMALL_BIAS = torch.tensor([1.0, 1.0])  # pre = [[0.5, 0.5, -1], [2.5, -2.5, 4]]
LINEAR = {"encoder.weight": ENCODER.T.contiguous(), "encoder.bias": B_ENC, "decoder.weight": DECODER.T.contiguous()}
NO_BIAS = {"encoder.bias": torch.tensor([0.0, -0.5, 0.0])}  # pre = [[0, 0.5, -1], [2, -2.5, 4]]
PLAIN = {"W_enc": ENCODER, "b_enc": B_ENC, "W_dec": DECODER, "b_dec": SMALL_BIAS}
BATCH = {"k": torch.tensor(2), "threshold": torch.tensor(0.5)}
GATED = {
    "encoder.weight": LINEAR["encoder.weight"], "decoder.weight": LINEAR["decoder.weight"], "decoder_bias": SMALL_BIAS,
    "gate_bias": torch.tensor([0.5, -2.0, 0.0]), "r_mag": torch.tensor([2.0, 1.0, 1.0]).log(),
    "mag_bias": torch.tensor([0.5, 0.0, -3.0]),
}  # fmt: skip


def trainer(folder: Path, tensors: dict[str, Tensor], dict_class: str, **changes: object) -> Path:
    settings = {"dict_class": dict_class, "lm_name": "tiny", "submodule_name": "resid_post_layer_3", "k": 1, **changes}
    return written(folder, tensors, "ae.pt", {"trainer": settings, "buffer": {"ctx_len": 8}}, "config.json")


@pytest.mark.parametrize(
    "dict_class, tensors, latents",
    [
        ("AutoEncoder", {**LINEAR, "bias": SMALL_BIAS}, [[0.5, 0.5, 0.0], [2.5, 0.0, 4.0]]),
        ("AutoEncoderNew", {**LINEAR, "decoder.bias": SMALL_BIAS}, [[1.5, 1.5, 0.0], [3.5, 0.0, 4.0]]),
        ("AutoEncoderTopK", {**LINEAR, **NO_BIAS, "b_dec": SMALL_BIAS, **BATCH}, [[0.0, 0.5, 0.0], [0.0, 0.0, 4.0]]),
        ("BatchTopKSAE", {**LINEAR, "b_dec": SMALL_BIAS, **BATCH}, [[0.0, 0.0, 0.0], [2.5, 0.0, 4.0]]),
        ("MatryoshkaBatchTopKSAE", {**PLAIN, **BATCH}, [[0.0, 0.0, 0.0], [2.5, 0.0, 4.0]]),
        ("JumpReluAutoEncoder", {**PLAIN, "threshold": GEMMA["threshold"]}, [[0.0, 1.5, 0.0], [3.5, 0.0, 0.0]]),
        # p = (X - b) ENCODER = [[0, 1, -1], [2, -2, 4]]; exp(r_mag) p + mag_bias where p > -gate_bias
        ("GatedAutoEncoder", GATED, [[0.5, 0.0, 0.0], [4.5, 0.0, 1.0]]),
    ],
)
def test_a_trainers_folder_encodes_as_its_class_does(
    tmp_path: Path, dict_class: str, tensors: dict[str, Tensor], latents: list[list[float]]
) -> None:
    folder = trainer(tmp_path / "resid_post_layer_3" / "trainer_1", tensors, dict_class)
    found = load_dictionary(folder)
    wanted = torch.tensor(latents)
    torch.testing.assert_close(found.encode(X), wanted)
    # f DECODER = (f0 + f2, 2 f1 + f2), then the bias
    by_hand = torch.stack([wanted[:, 0] + wanted[:, 2] + 1, 2 * wanted[:, 1] + wanted[:, 2] + 1], dim=1)
    torch.testing.assert_close(found(X), by_hand)
    assert found.hook_point == "blocks.3.hook_resid_post"
    assert load_dictionary(folder / "ae.pt").content_hash() == found.content_hash()


def test_a_wrong_guess_about_dictionary_learning_is_refused(tmp_path: Path) -> None:
    sae = {**LINEAR, "b_dec": SMALL_BIAS, **BATCH}
    with pytest.raises(InputError, match=r"has dict_class 'PAnnealSAE'; AutoEncoder, AutoEncoderNew, .* are read"):
        inspect_dictionary(trainer(tmp_path / "unknown", sae, "PAnnealSAE"))
    with pytest.raises(InputError, match=r"saved before its threshold was known. Use a later"):
        load_dictionary(trainer(tmp_path / "early", {**sae, "threshold": torch.tensor(-1.0)}, "BatchTopKSAE"))
    with pytest.raises(InputError, match=r"'threshold' has shape None, expected \(\) from its biases"):
        inspect_dictionary(trainer(tmp_path / "torn", {**LINEAR, "b_dec": SMALL_BIAS}, "BatchTopKSAE"))
    with pytest.raises(InputError, match="sits at 'attn_out_layer_3', which cannot be run"):
        inspect_dictionary(trainer(tmp_path / "attn", sae, "BatchTopKSAE", submodule_name="attn_out_layer_3"))
    with pytest.raises(InputError, match="of dictionary_learning, such as 'trainer_1'"):
        inspect_dictionary(trainer(tmp_path / "layer_3" / "trainer_1", sae, "BatchTopKSAE").parent)


# ------------------------------------------------------------------------------------------------------ Qwen Scope

QWEN = {"W_enc": ENCODER.T.contiguous(), "W_dec": DECODER.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
REPOSITORY = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_1"


def test_qwen_scope_keeps_the_k_largest_of_each_token(tmp_path: Path) -> None:
    folder = tmp_path / REPOSITORY
    tensors = {**QWEN, "b_enc": torch.tensor([0.75, -0.5, 0.0])}  # pre = [[1.75, 1.5, -1], [3.75, -1.5, 4]]
    written(folder, tensors, "layer7.sae.pt", None, "")
    found = load_dictionary(folder / "layer7.sae.pt")
    assert torch.equal(found.encode(X), torch.tensor([[1.75, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    assert torch.equal(found(X), torch.tensor([[11.75, 20.0], [14.0, 24.0]]))
    assert found.hook_point == "blocks.7.hook_resid_post" and found.info.model_names == ("Qwen/Qwen3-1.7B-Base",)
    assert load_dictionary(folder).content_hash() == found.content_hash()


class Loud:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_wrong_guess_about_qwen_scope_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / REPOSITORY, QWEN, "layer7.sae.pt", None, "")
    torch.save(QWEN, folder / "layer8.sae.pt")
    with pytest.raises(InputError, match=r"holds the SAEs of 2 layers. Give the file of one, such as '.*layer7.sae"):
        inspect_dictionary(folder)
    with pytest.raises(InputError, match=r"does not say k, .* such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"):
        inspect_dictionary(written(tmp_path / "renamed", QWEN, "layer7.sae.pt", None, "") / "layer7.sae.pt")
    turned = tmp_path / "turned" / REPOSITORY
    with pytest.raises(InputError, match=r"'W_enc' has shape \(2, 3\), expected \(3, 2\) .* It is transposed"):
        inspect_dictionary(written(turned, {**QWEN, "W_enc": ENCODER}, "layer7.sae.pt", None, ""))
    monkeypatch.chdir(tmp_path)
    torch.save({**QWEN, "extra": Loud()}, folder / "layer9.sae.pt")
    with pytest.raises(InputError, match="refused: it needs unpickling of more than tensors"):
        load_dictionary(folder / "layer9.sae.pt")
    assert not Path("ran").exists()


# -------------------------------------------------------------------------------------------------------- sparsify

SPARSE = {"encoder.weight": ENCODER.T.contiguous(), "encoder.bias": torch.tensor([0.0, -0.5, 0.0]), "W_dec": DECODER,
          "b_dec": SMALL_BIAS}  # fmt: skip
TOP_1 = {"k": 1, "d_in": 2, "num_latents": 3, "activation": "topk", "skip_connection": False, "transcode": False}


def sparsify(folder: Path, tensors: dict[str, Tensor] = SPARSE, **changes: object) -> Path:
    return written(folder, tensors, "sae.safetensors", {**TOP_1, **changes}, "cfg.json")


def test_sparsify_keeps_the_k_largest_of_what_is_left_without_the_bias(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny"}))
    found = load_dictionary(sparsify(tmp_path / "layers.3"))
    assert torch.equal(found.encode(X), torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 4.0]]))  # see NO_BIAS
    assert torch.equal(found(X), torch.tensor([[1.0, 2.0], [5.0, 5.0]]))
    assert found.hook_point == "blocks.3.hook_resid_post" and found.info.model_names == ("tiny",)


def test_a_skip_transcoder_of_sparsify_reads_its_modules_input_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "layers.3.mlp"
    sparsify(folder, {**SPARSE, "W_skip": SKIP.T.contiguous()}, transcode=True, skip_connection=True)
    info = inspect_dictionary(folder, model_type="llama")
    assert (info.hook_point, info.writes) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    found = load_dictionary(folder, hook_point="blocks.3.mlp.hook_in")
    assert torch.equal(found.encode(X), torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 4.0]]))  # pre = X ENCODER + bias
    # decoded [[1, 4], [5, 5]], and x W_skip.T of the file = [[2000, 100], [-1000, 300]]
    assert torch.equal(found(X), torch.tensor([[2001.0, 104.0], [-995.0, 305.0]]))


def test_a_wrong_guess_about_sparsify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has activation groupmax; topk is read"):
        inspect_dictionary(sparsify(tmp_path / "a" / "layers.3", activation="groupmax"))
    with pytest.raises(InputError, match=r"has shape \(2, 3\), expected \(3, 2\) from its biases. It is transposed"):
        inspect_dictionary(sparsify(tmp_path / "b" / "layers.3", {**SPARSE, "W_dec": DECODER.T.contiguous()}))
    with pytest.raises(InputError, match="does not say its hook point"):
        inspect_dictionary(sparsify(tmp_path / "downloaded"))
    with pytest.raises(InputError, match=r"cfg.json"):
        inspect_dictionary(written(tmp_path / "layers.4", SPARSE, "sae.safetensors", None, ""))


# ------------------------------------------------------------------------------- Gemma Scope 2 over layers of a model

# File 0 reads layer 1: one latent, x_0 alone; file 1 reads layer 2: one latent, 2 x_1. Width 2, d_model 2.
PARTS = [
    {
        "w_enc": torch.tensor([[1.0], [0.0]]), "b_enc": torch.tensor([-0.5]), "threshold": torch.tensor([1.0]),
        "w_dec": torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), "b_dec": torch.tensor([10.0, 20.0]),
    },
    {
        "w_enc": torch.tensor([[0.0], [2.0]]), "b_enc": torch.tensor([0.0]), "threshold": torch.tensor([4.0]),
        "w_dec": torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]), "b_dec": torch.tensor([30.0, 40.0]),
    },
]  # fmt: skip
OVER_LAYERS = {"type": "crosscoder", "hf_hook_point_in": "model.layers.{1,2}.output", "model_name": "gemma-3-270m-pt"}
# Two tokens, (token, layer, d_model). Latents: (2 - .5, 2 * 3) and (1 - .5 is not above 1, 2 * 2 is not above 4).
LAYERS = torch.tensor([[[2.0, 7.0], [7.0, 3.0]], [[1.0, 7.0], [7.0, 2.0]]])
LATENTS = torch.tensor([[1.5, 6.0], [0.0, 0.0]])
DECODED = torch.tensor([[[11.5, 20.0], [60.0, 44.5]], [[10.0, 20.0], [30.0, 40.0]]])


def over_layers(
    folder: Path, parts: list[dict[str, Tensor]] = PARTS, config: dict[str, Any] | None = OVER_LAYERS
) -> Path:
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        save_file(part, folder / f"params_layer_{number}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_crosscoder_over_layers_encodes_each_layer_by_its_own_latents_and_writes_to_all(tmp_path: Path) -> None:
    found = load_crosscoder(over_layers(tmp_path / "it"))
    assert torch.equal(found.encode(LAYERS), LATENTS) and torch.equal(found(LAYERS), DECODED)
    assert torch.equal(found.gate_at(), torch.tensor([1.0, 4.0]))
    found.save(tmp_path / "ours")
    assert torch.equal(load_crosscoder(tmp_path / "ours")(LAYERS), DECODED)


def test_a_crosscoder_over_layers_may_name_them_in_a_list_or_in_its_folder(tmp_path: Path) -> None:
    listed = {**OVER_LAYERS, "hf_hook_point_in": ["model.layers.1.output", "model.layers.2.output"]}
    assert read_layers(over_layers(tmp_path / "a", config=listed)).layers == [1, 2]
    assert read_layers(over_layers(tmp_path / "layer_5_9_width_65k_l0_medium", config=None)).layers == [5, 9]


def test_a_torn_crosscoder_over_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reads 2 layers but holds 1 files params_layer_N.safetensors"):
        load_crosscoder(over_layers(tmp_path / "short", PARTS[:1]))
    with pytest.raises(InputError, match=r"does not say which layers it reads"):
        load_crosscoder(over_layers(tmp_path / "unnamed", config=None))
    flat = [{**part, "w_dec": part["w_dec"][:, 0].contiguous()} for part in PARTS]  # as an SAE's
    with pytest.raises(InputError, match=r"'w_dec' has shape \(1, 2\), expected \(1, 2, 2\)"):
        load_crosscoder(over_layers(tmp_path / "flat", flat))
    with pytest.raises(InputError, match="'jumprelu' is read, not trained"):
        TrainConfig(crosscoder=CrosscoderConfig(dict_size=2, activation="jumprelu"))


# --------------------------------------------------------------------------------------------------------- SAELens

LENS = {"W_enc": ENCODER, "b_enc": B_ENC, "W_dec": DECODER, "b_dec": SMALL_BIAS}
LENS_CONFIG = {
    "d_in": 2, "d_sae": 3, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none",
}  # fmt: skip
THRESHOLDS = {"threshold": GEMMA["threshold"]}
AS_IT_IS = {"apply_b_dec_to_input": False}
READS = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out", "sae_lens_version": "6.54.0"}


def lens(folder: Path, architecture: str, tensors: dict[str, Tensor] = LENS, **changes: object) -> Path:
    metadata = {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.54.0"}
    config = {**LENS_CONFIG, "architecture": architecture, "metadata": metadata, **changes}
    return written(folder, tensors, "sae_weights.safetensors", config, "cfg.json")


ROTATED = {"W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), "b_dec": SMALL_BIAS}
"""Of a matching pursuit: X - 1 = (0, 1) is latent 1 alone; (2, -2) is 2 of latent 0 and -2 of latent 1."""
GATED_LENS = {"W_enc": ENCODER, "W_dec": DECODER, "b_dec": SMALL_BIAS, "b_gate": GATED["gate_bias"],
              "r_mag": GATED["r_mag"], "b_mag": GATED["mag_bias"]}  # fmt: skip


@pytest.mark.parametrize(
    "architecture, tensors, changes, latents",
    [
        ("standard", LENS, {}, [[0.5, 0.5, 0.0], [2.5, 0.0, 4.0]]),
        ("gated", GATED_LENS, {}, [[0.5, 0.0, 0.0], [4.5, 0.0, 1.0]]),
        ("topk", LENS, {"k": 1, **AS_IT_IS}, [[1.5, 0.0, 0.0], [0.0, 0.0, 4.0]]),
        ("abstopk", LENS, {"k": 1}, [[0.0, 0.0, -1.0], [0.0, 0.0, 4.0]]),
        ("jumprelu", {**LENS, **THRESHOLDS}, AS_IT_IS, [[0.0, 1.5, 0.0], [3.5, 0.0, 0.0]]),
    ],
)
def test_every_architecture_of_sae_lens_that_can_be_spliced_encodes_as_it_says(
    tmp_path: Path, architecture: str, tensors: dict[str, Tensor], changes: dict[str, Any], latents: list[list[float]]
) -> None:
    if architecture == "topk":  # the two largest of the first token are equal with B_ENC
        tensors = {**tensors, "b_enc": torch.tensor([0.5, -0.75, 0.0])}
    found = load_dictionary(lens(tmp_path / "sae", architecture, tensors, **changes))
    wanted = torch.tensor(latents)
    torch.testing.assert_close(found.encode(X), wanted)
    by_hand = torch.stack([wanted[:, 0] + wanted[:, 2] + 1, 2 * wanted[:, 1] + wanted[:, 2] + 1], dim=1)
    torch.testing.assert_close(found(X), by_hand)


def test_a_matching_pursuit_of_sae_lens_is_read_though_its_encoder_is_its_decoder(tmp_path: Path) -> None:
    settings = {"residual_threshold": 1e-3, "max_iterations": 4, "stop_on_duplicate_support": True}
    found = load_dictionary(lens(tmp_path / "sae", "matching_pursuit", ROTATED, **settings))
    latents = found.encode(X)
    torch.testing.assert_close(latents[0], torch.tensor([0.0, 1.0, 0.0]))
    with pytest.raises(InputError, match=r"would change the latents of .* a matching_pursuit SAE"):
        with_random_decoder(found, 0)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_a_transcoder_of_sae_lens_computes_and_is_not_spliced(tmp_path: Path, architecture: str) -> None:
    tensors = LENS | (THRESHOLDS if "jumprelu" in architecture else {})
    if "skip" in architecture:
        tensors = tensors | {"W_skip": SKIP.T.contiguous()}
    folder = lens(tmp_path / "it", architecture, tensors, d_out=2, metadata=READS, **AS_IT_IS)
    found = load_dictionary(folder)
    wanted = torch.tensor([[1.5, 1.5, 0.0], [3.5, 0.0, 4.0]])
    if "jumprelu" in architecture:
        wanted = torch.tensor([[0.0, 1.5, 0.0], [3.5, 0.0, 0.0]])
    torch.testing.assert_close(found.encode(X), wanted)
    by_hand = torch.stack([wanted[:, 0] + wanted[:, 2] + 1, 2 * wanted[:, 1] + wanted[:, 2] + 1], dim=1)
    torch.testing.assert_close(found(X), by_hand + (X @ SKIP if "skip" in architecture else 0))
    with pytest.raises(InputError, match=r"is a transcoder: it reads 'blocks.3.mlp.hook_in' and computes"):
        splice(torch.nn.Linear(2, 2), found).__enter__()


def test_what_sae_lens_reads_and_cannot_be_spliced_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"architecture 'temporal', which reads whole sequences; standard, gated, topk"
    ):
        inspect_dictionary(lens(tmp_path / "temporal", "temporal"))
    with pytest.raises(InputError, match="'W_skip' has shape None"):
        inspect_dictionary(lens(tmp_path / "torn", "skip_transcoder", d_out=2, metadata=READS))


def test_every_architecture_that_sae_lens_reads_is_loaded_or_refused_by_name() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert set(SAE_CLASS_REGISTRY) == {*sae_lens.ARCHITECTURES, *sae_lens.TRANSCODERS, "temporal"}


# ------------------------------------------------------------------------------------------------- torn and unknown


@pytest.mark.parametrize(
    "weights, config, said",
    [
        ("notes.pt", None, "holds no dictionary: it holds notes.pt"),
        (
            "notes.pt",
            {"type": "sae", "architecture": "jump_relu"},
            "holds no dictionary: it holds config.json, notes.pt",
        ),
        (
            "params_layer_1.safetensors",
            {"type": "crosscoder"},
            "holds no dictionary: it holds config.json, params_layer_1",
        ),
        ("resid_post/layer_12_width_16k_l0_small/params.safetensors", None, "folders of them, such as '.*l0_small'"),
        ("resid_post_layer_3/trainer_1/ae.pt", None, "folders of them, such as '.*resid_post_layer_3/trainer_1'"),
    ],
)
def test_a_torn_or_unknown_folder_says_what_would_load(
    tmp_path: Path, weights: str, config: dict[str, Any] | None, said: str
) -> None:
    path = tmp_path / "it" / weights
    written(path.parent, {"a": torch.zeros(2)}, path.name, config, "config.json")
    with pytest.raises(InputError, match=said + r".* What is read: params.npz of Gemma Scope, ") as caught:
        inspect_dictionary(tmp_path / "it", hook_point="blocks.1.hook_resid_post")
    assert "\n" not in str(caught.value)
